"""Jobs on a real cluster of two nodes with a token, and an MLflow server.

A submitted run has its files, survives the loss of a worker, and has the results of an undisturbed run.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from odedit.__main__ import app
from pipeline.config.run import from_dict
from pipeline.driver.run import run
from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking.connection import connect
from pipeline.tracking.searches import KIND
from tests.support import inline_pipeline
from tests.support.mmedit_files import record, write_array, write_images
from tests.support.nodes import PATIENCE_S, Cluster, two_nodes
from tests.support.rows import assert_same
from tests.support.services import server

RECORDS = 12
EDITOR = {"name": "outside_tuned.fragile", "sites": ["layers.2.ffn.out"], "max_steps": 3}
JOB_S = 400.0
PASSWORD = secrets.token_hex(16)
LOGIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass
class Site:
    """A user's folder, the cluster and the MLflow server."""

    cluster: Cluster
    mlflow: str
    folder: Path

    def odedit(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "odedit", *map(str, arguments)],
            cwd=self.folder,
            env={**self.cluster.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: object) -> subprocess.Popen[str]:
        login = [f"--env={name}" for name in LOGIN if "--" in arguments]
        return self.odedit("submit", "--address", self.cluster.address, *login, *arguments, **LOGIN)


def ended(process: subprocess.Popen[str], code: int) -> str:
    """Output of a command that must end with the given exit code."""
    text, _ = process.communicate(timeout=JOB_S)
    assert process.returncode == code, text[-6000:]
    return text


def until(is_so: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    begun = time.monotonic()
    while not (value := is_so()):
        assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() - begun < PATIENCE_S
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "private.txt").write_text("private")
    records = [record(number) for number in range(RECORDS)]
    others = [record(number) for number in range(RECORDS, RECORDS + 4)]
    image_root, rephrase_root = write_images(folder, records + others)
    write_array(folder / "records.json", records)
    write_array(folder / "others.json", others)
    shutil.copytree(Path(__file__).parents[1] / "tune" / "outside_tuned", folder / "outside_tuned")
    store = folder / "server"
    store.mkdir()
    with two_nodes() as cluster, server(f"sqlite:///{store / 'mlflow.db'}", store, PASSWORD) as mlflow:
        values = {
            "data": {
                "path": "records.json",
                "image_root": image_root.name,
                "rephrase_root": rephrase_root.name,
            },
            "supervision": {"locality_source": "record"},
            "editor": EDITOR | {"pause_s": 0.5},
            # The editor's own terms, which pause.
            "objective": {"own_weight": 1.0},
            "evaluation": {"generate": False},
            "pipeline": {"batch_size": 2, "actors": 2, "threads_per_actor": 1},
            "tracking": {"uri": mlflow, "experiment": "jobs"},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        yield Site(cluster, mlflow, folder)


def rows(out: Path) -> list[dict[str, Any]]:
    table = list(results.read_rows(results.parts(Workspace.of(str(out)))))
    for row in table:
        del row["editor"], row["trained_with"]
    return table


def test_an_edit_job_loses_a_worker_and_leaves_what_an_undisturbed_run_leaves(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    job = site.submit("--env", "MLFLOW_DISABLE_TELEMETRY", "--", "edit", "--config", "run.yaml", f"out={out}")
    until(lambda: list((out / "attempts").glob("group-*")) and list((out / "results").glob("part-*")), job)
    until(lambda: site.cluster.workers("EditStage"), job)[0].send_signal(signal.SIGKILL)
    text = ended(job, 0)
    assert f"{RECORDS} edits, 0 failed, 0 skipped" in text and "SUCCEEDED" in text
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["n"], summary["failed"]) == (RECORDS, 0)

    calm = yaml.safe_load((site.folder / "run.yaml").read_text())
    calm["editor"]["pause_s"] = 0.0
    calm["tracking"] = {"enabled": False}
    monkeypatch.chdir(site.folder)
    inline_pipeline.install(monkeypatch)
    monkeypatch.syspath_prepend(str(site.folder))
    run(from_dict(calm | {"out": str(tmp_path / "calm")}), Console(quiet=True))
    assert_same(rows(out), rows(tmp_path / "calm"))

    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    client = connect(site.mlflow)
    (logged,) = client.search_runs([client.get_experiment_by_name("jobs").experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["metrics/rel"] == pytest.approx(summary["metrics"]["rel"]["mean"])


def test_a_search_is_a_job_as_well(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.folder / "search.yaml").write_text(
        yaml.safe_dump(
            {
                "settings": {
                    **yaml.safe_load((site.folder / "run.yaml").read_text()),
                    "editor": EDITOR,
                    "pipeline": {"batch_size": 2, "threads_per_actor": 1},
                    "keep_edits": False,
                },
                "validation": {"path": "others.json"},
                "space": {"editor.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
                "rungs": {"edits": 2, "factor": 2, "number": 2},
                "trials": 4,
            }
        )
    )
    out = tmp_path / "search"
    text = ended(site.submit("--", "tune", "--config", "search.yaml", "--out", out), 0)
    assert "SUCCEEDED" in text
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert 1e-4 <= best["editor"]["learning_rate"] <= 1e-2
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    client = connect(site.mlflow)
    kinds = [
        logged.data.tags.get(KIND)
        for experiment in client.search_experiments()
        for logged in client.search_runs([experiment.experiment_id])
    ]
    assert kinds.count("trial") == 4 and kinds.count("search") == 1


def test_a_job_is_left_followed_and_ended(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    edit = ("--", "edit", "--config", "run.yaml", f"out={out}", "tracking.enabled=false", "pipeline.actors=1")
    slow = (*edit, "editor.quick=records-000000", "editor.pause_s=25")
    text = ended(site.submit("--no-wait", *slow), 0)
    job = text.split("Job ")[1].split(".")[0]
    following = site.submit("--follow", job)
    until(lambda: list((out / "results").glob("part-*")), following)
    following.send_signal(signal.SIGINT)
    assert f"Job {job} goes on" in ended(following, 130)
    following = site.submit("--follow", job)
    assert "the same command goes on from there" in ended(site.submit("--stop", job), 0)
    assert "STOPPED" in ended(following, 1)
    assert "had ended already" in ended(site.submit("--stop", job), 1)
    quick = [text.replace("pause_s=25", "pause_s=0") for text in slow]
    text = ended(site.submit(*quick), 2)
    assert "editor.pause_s: was 25.0, now 0.0" in text or "editor.pause_s: was 25, now 0" in text


def test_without_its_password_the_server_is_not_used(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.folder)
    monkeypatch.syspath_prepend(str(site.folder))
    for name in LOGIN:
        monkeypatch.delenv(name, raising=False)
    refused = CliRunner().invoke(app, ["edit", "--config", "run.yaml", f"out={tmp_path / 'out'}"])
    assert refused.exit_code == 2 and "cannot be used" in refused.output, (refused.output, refused.exception)
    assert "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in refused.output


def test_the_password_is_written_nowhere(site: Site, tmp_path: Path) -> None:
    """The jobs' results, settings and logs, and MLflow's files do not contain the password."""
    files = [file for file in tmp_path.parent.rglob("*") if file.is_file() and file.name != "auth.ini"]
    logs = list(Path(site.cluster.environment["RAY_TMPDIR_OF_TEST"]).rglob("job-driver-*.log"))
    assert logs
    files += logs
    assert len(files) > 50
    assert not [file for file in files if PASSWORD.encode() in file.read_bytes()]


def test_rays_own_command_works_as_well_and_no_command_without_the_token(site: Site, tmp_path: Path) -> None:
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={site.cluster.address}"]
    command = [*ray, "--working-dir=.", "--", "python", "-m", "odedit", "edit", "--config", "run.yaml"]
    command += [f"out={tmp_path / 'out'}", "tracking.enabled=false", "editor.pause_s=0", "pipeline.actors=1"]
    done = subprocess.run(
        command, cwd=site.folder, env=dict(site.cluster.environment), capture_output=True, text=True, timeout=JOB_S
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert len(rows(tmp_path / "out")) == RECORDS
    refused = site.odedit("submit", "--address", site.cluster.address, "--stop", "x", RAY_AUTH_TOKEN="wrong")
    assert "refuses the token in RAY_AUTH_TOKEN." in ended(refused, 2)
