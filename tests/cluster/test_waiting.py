"""A real cluster: it refuses other tokens, runs wait for its nodes, and a run ends when it loses one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.mmedit_files import record, write_array, write_images
from tests.support.nodes import LOSSES_SEEN_SOON, PATIENCE_S, Cluster, two_nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Cluster whose head runs no workers, as in the files of `cluster/`."""
    with two_nodes(head_cpus=0, **LOSSES_SEEN_SOON) as nodes:
        yield nodes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [record(number) for number in range(6)]
    image_root, rephrase_root = write_images(tmp_path, records)
    write_array(tmp_path / "records.json", records)
    shutil.copytree(Path(__file__).parents[1] / "tune" / "outside_tuned", tmp_path / "outside_tuned")
    settings: dict[str, Any] = {
        "data": {"path": "records.json", "image_root": image_root.name, "rephrase_root": rephrase_root.name},
        "supervision": {"locality_source": "record"},
        "editor": {"name": "outside_tuned.fragile", "sites": ["layers.2.ffn.out"], "max_steps": 1},
        "objective": {"name": "native"},
        "evaluation": {"generate": False, "mmedit": False},
        "pipeline": {"batch_size": 1, "actors": 1, "threads_per_actor": 2, "preparers": 1},
        "tracking": {"uri": "sqlite:///mlflow.db"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    search = {
        "settings": settings | {"pipeline": {"batch_size": 1}},
        "validation": {"path": "records.json", "limit": 2},
        "space": {"editor.learning_rate": {"low": 1e-4, "high": 1e-2}},
        "rungs": {"edits": 1, "number": 1},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    return tmp_path


def odedit(folder: Path, cluster: Cluster, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(folder)])
    return subprocess.Popen(
        [sys.executable, "-m", "odedit", *map(str, arguments)],
        cwd=folder,
        env=environment | {"HOME": str(folder)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(is_so: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not is_so():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() - begun < PATIENCE_S
        time.sleep(0.1)


def test_without_the_right_token_nothing_is_begun(cluster: Cluster, folder: Path) -> None:
    address = f"pipeline.ray_address={cluster.gcs}"
    edit = ("edit", "--config", "run.yaml", address)
    tune = ("tune", "--config", "search.yaml", f"settings.{address}", "validation.path=others.json")
    study = ("study", "memory", "--config", "study.yaml", f"settings.{address}")
    write_array(folder / "others.json", [record(number) for number in range(6, 8)])
    write_images(folder, [record(number) for number in range(6, 8)])
    values = yaml.safe_load((folder / "run.yaml").read_text())
    arms = {"objective": {"native": {}, "slow": {"editor": {"learning_rate": 1e-4}}}, "editor": None}
    plot = {"kind": "dots", "y": "objective", "colour": None, "columns": ["rel"]}
    changes = {"draw": None, "settings": values, "axes": arms, "columns": ["rel"], "plot": plot}
    (folder / "study.yaml").write_text(yaml.safe_dump(changes))
    asked = "asks for a token, and none is given. Set RAY_AUTH_TOKEN to the cluster's token"
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (edit, {}, asked),
        (tune, {}, asked),
        (study, {}, asked),
        (edit, {"RAY_AUTH_TOKEN": "wrong"}, "refuses the token in RAY_AUTH_TOKEN."),
        (
            edit,
            {"RAY_AUTH_TOKEN_PATH": "none"},
            "RAY_AUTH_TOKEN_PATH: the token's file none cannot be read (No such file",
        ),
    ]
    processes = []
    for number, (command, variables, _) in enumerate(cases):
        out = (f"out=runs/{number}",) if command is edit else ("--out", f"runs/{number}")
        processes.append(odedit(folder, cluster, *command, *out, **variables))
    for process, (_, _, expected) in zip(processes, cases, strict=True):
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 2 and expected in output, output
    assert not list(folder.rglob("mlflow.db"))


def test_a_run_waits_for_nodes_and_gives_up_where_none_comes(cluster: Cluster, folder: Path) -> None:
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(cluster.environment["RAY_AUTH_TOKEN"])
    run = ("edit", "--config", "run.yaml", f"pipeline.ray_address={cluster.gcs}", "out=runs/one")
    cluster.lose_second()
    waiting = odedit(folder, cluster, *run, "editor.pause_s=2")
    lines: list[str] = []
    assert waiting.stdout is not None
    for line in waiting.stdout:
        lines.append(line)
        if line.startswith("Waiting for the cluster, for at most 600 s (pipeline.wait_s):"):
            break
    assert "need 2 cores, the cluster has 0" in lines[-1] or "no node of the cluster has as much" in lines[-1], lines
    cluster.add()
    until(lambda: len(list((folder / "runs" / "one" / "results").glob("part-*"))) >= 2, waiting)
    waiting.terminate()
    waiting.communicate(timeout=PATIENCE_S)

    losing = odedit(folder, cluster, *run, "editor.pause_s=2", "pipeline.wait_s=3")
    done = len(list((folder / "runs" / "one" / "results").glob("part-*")))
    until(lambda: len(list((folder / "runs" / "one" / "results").glob("part-*"))) > done, losing)
    cluster.lose_second()
    output, _ = losing.communicate(timeout=PATIENCE_S)
    assert losing.returncode == 1, output[-4000:]
    lost = "The cluster has lost what the run needs: a worker takes 1.5 CPU, and no node of the cluster has as"
    assert lost in output
    refused = odedit(folder, cluster, *run, "editor.pause_s=2", "pipeline.wait_s=0")
    output, _ = refused.communicate(timeout=PATIENCE_S)
    assert refused.returncode == 2 and "nothing was added within 0 s (pipeline.wait_s)" in output, output[-4000:]
