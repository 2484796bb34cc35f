"""Whole searches with their own Ray: killed, resumed, with crashing trials; their files and MLflow runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from typer.testing import CliRunner, Result

from odedit import InputError
from odedit.__main__ import app
from pipeline.run_folder import staging
from pipeline.run_folder.rows import parts, read_rows
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking.client import PARENT_TAG
from pipeline.tracking.connection import connect
from pipeline.tracking.names import MOST
from pipeline.tracking.searches import KIND, POINT, STATE
from tune import points
from tune import run as runner
from tune.config import from_values
from tune.folder import Folder, alone
from tune.run import run

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 240.0
_TRIAL = re.compile("EditTrial|ResourceTrainable")
"""Names that Ray gives to processes of idle and of running trials."""
FRAGILE = {"name": "outside_tuned.fragile", "sites": ["layers.2.ffn.out"], "max_steps": 2}


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def written(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def started(*arguments: object) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "odedit", "tune", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def study_in(out: Path) -> Any:
    name = json.loads((out / "search.json").read_text())["study"]
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(out / "optuna.journal"))))


def states(out: Path) -> Counter[str]:
    return Counter(trial.state.name for trial in study_in(out).trials)


def done(out: Path) -> int:
    """Number of finished trials."""
    found = states(out) if (out / "search.json").exists() else Counter()
    return found["COMPLETE"] + found["PRUNED"]


def kill_a_worker() -> None:
    """Kills a child process that runs a trial, as soon as there is one."""
    wait_until(at_work, "a trial is at work")
    at_work()[0].kill()


def at_work() -> list[psutil.Process]:
    """Processes of trials within a rung. One that is still being set up would be replaced by Ray."""
    return [process for process in workers() if any(".train" in part for part in command_of(process))]


def workers(driver: int | None = None) -> list[psutil.Process]:
    """Processes of the trials of a driver, or of this process."""
    family = psutil.Process(driver).children(recursive=True)
    return [process for process in family if any(_TRIAL.search(part) for part in command_of(process))]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def children(out: Path) -> tuple[Any, list[Any]]:
    """The parent run in MLflow and its child runs."""
    client = connect(f"sqlite:///{out}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    every = client.search_runs(experiments)
    (parent,) = [run for run in every if run.data.tags.get(KIND) == "search"]
    mine = [run for run in every if run.data.tags.get(PARENT_TAG)]
    assert {run.data.tags[PARENT_TAG] for run in mine} == {parent.info.run_id}
    rest = [run for run in every if run is not parent and run not in mine]
    assert {run.data.tags[KIND] for run in rest} <= {"evaluation"}
    return parent, mine


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def wait_until(condition: Any, what: str, running: subprocess.Popen[str] | None = None) -> None:
    begun = time.monotonic()
    while not condition():
        assert running is None or running.poll() is None, running.communicate() if running else ""
        assert time.monotonic() - begun < PATIENCE_S, f"waited in vain until {what}"
        time.sleep(0.1)


@pytest.mark.ray
def test_a_search_that_is_interrupted_and_killed_goes_on_to_as_many_trials_as_were_asked_for(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["settings"]["editor"] = FRAGILE | {"max_steps": 8, "pause_s": 0.05}
    values["space"] = {"editor.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    values["settings"]["objective"] = {"name": "native", "own_weight": 1.0}
    values["rungs"] = {"edits": 4, "factor": 2, "number": 2}
    values["trials"] = 9
    out = tmp_path / "out"

    # Ctrl-C.
    search = started("--config", written(values, tmp_path), "--out", out)
    wait_until(lambda: (out / "optuna.journal").exists() and done(out) >= 2, "two trials are done", search)
    search.send_signal(signal.SIGINT)
    _, stderr = search.communicate(timeout=PATIENCE_S)
    assert search.returncode == 130 and "goes on from there" in stderr, stderr
    parent, runs = children(out)
    assert parent.info.status == "KILLED" and {run.info.status for run in runs} <= {"FINISHED", "KILLED"}

    # SIGKILL of the driver.
    before_kill = done(out)
    search = started("--resume", out)
    wait_until(lambda: done(out) >= before_kill + 2 and states(out)["RUNNING"] >= 1, "two more are done", search)
    left = workers(search.pid)
    assert left
    busy = odedit("tune", "--resume", out)
    assert busy.exit_code == 2 and f"is running (process {search.pid})" in busy.stderr
    search.kill()
    search.communicate()
    # A trial that was killed before its point was whole does not count.
    ended = [trial for trial in study_in(out).trials if trial.state.is_finished()]
    finished = [trial for trial in ended if points.REPEATED not in trial.user_attrs]
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/results/*.parquet")}
    # Ray's agents end a minute later; they edit nothing.
    wait_until(lambda: gone(left), "the killed search's workers are gone")

    # Other settings are refused; the same search goes on.
    other = odedit("tune", "--resume", out, "--config", tmp_path / "search.yaml", "seed=7")
    assert other.exit_code == 2 and "holds another search:\n  seed: was 0, now 7" in other.stderr
    # SIGKILL of a worker.
    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    again = odedit("tune", "--resume", out)
    killer.join()
    stdout, stderr = again.stdout, again.stderr
    assert again.exit_code == 0, (stderr, again.exception)
    study = study_in(out)
    tried = [trial for trial in study.trials if points.REPEATED not in trial.user_attrs]
    assert len(tried) == len({trial.user_attrs["key"] for trial in tried}) == 9
    assert len({json.dumps(trial.params) for trial in tried}) == 9
    assert all(trial.state.is_finished() for trial in study.trials)
    after = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/results/*.parquet")}
    assert {path: after[path] for path in before} == before, "nothing is edited twice"
    assert f"{len(finished)} of 9 trials done" in stderr and "broke off" in stderr

    parent, runs = children(out)
    assert len(runs) == len({run.data.tags[POINT] for run in runs}) == 9
    assert parent.info.status == "FINISHED" and {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags[POINT] for run in runs} == {trial.user_attrs["key"] for trial in tried}
    client = connect(f"sqlite:///{out}/mlflow.db")
    for child in runs:
        history = client.get_metric_history(child.info.run_id, "score")
        assert [point.step for point in sorted(history, key=lambda point: point.step)] == (
            [4, 8] if child.data.tags[STATE] == "complete" else [4]
        )
        assert float(child.data.params["editor.learning_rate"]) > 0
        assert {"metrics/rel", "training/curves/rel"} <= child.data.metrics.keys() and len(child.data.metrics) <= MOST
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"best.yaml", "summary.md", "history.png", "parallel.png", "trials.csv", "search.yaml"} <= names
    assert float(parent.data.tags["best.editor.learning_rate"]) > 0
    assert "best so far: trial" in stderr and "On the evaluation records" in stdout
    assert not list(out.glob(".tune-*"))

    # No trial is left to do; additional trials are run.
    runs_before = {run.info.run_id for run in runs}
    nothing = odedit("tune", "--resume", out)
    assert nothing.exit_code == 0 and len(study_in(out).trials) == len(study.trials)
    assert {run.info.run_id for run in children(out)[1]} == runs_before
    dry = odedit("edit", "--config", out / "best.yaml", "--dry-run", "out=" + str(tmp_path / "again"))
    assert dry.exit_code == 0 and "4 usable records" in dry.stdout
    edited = odedit("edit", "--config", out / "best.yaml")
    assert edited.exit_code == 0 and "is finished" in edited.stderr


@pytest.mark.ray
def test_trials_that_crash_are_taken_up_again_and_then_fail_while_the_others_complete(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "died-once"
    values["settings"]["editor"] = FRAGILE | {"edit": "validation-000003", "marker": str(marker)}
    values["settings"]["objective"] = {"name": "native", "own_weight": 1.0}
    values["space"] = {"editor.mode": {"choices": ["well", "always", "once", "raise"]}}
    values["rungs"] = {"edits": 4, "factor": 2, "number": 2}
    values |= {"trials": 9, "retries": 1}
    out = tmp_path / "out"
    lines = tmp_path / "lines.txt"
    with lines.open("w") as stream:
        found = run(from_values(values), out, Console(file=stream, width=200))
    text = lines.read_text()
    by_mode = {
        trial.params["editor.mode"]: trial for trial in study_in(out).trials if points.REPEATED not in trial.user_attrs
    }
    assert {mode: trial.state.name for mode, trial in by_mode.items()} | {"well": "", "once": ""} == {
        "always": "FAIL",
        "raise": "FAIL",
        "well": "",
        "once": "",
    }
    assert {by_mode[mode].state.name for mode in ("well", "once")} <= {"COMPLETE", "PRUNED"}
    assert marker.exists() and text.count("broke off") == 2
    assert "a number that is none" in by_mode["raise"].user_attrs["error"]
    assert by_mode["always"].user_attrs["error"]
    assert "The space holds 4 different points, and all were tried." in text
    _, runs = children(out)
    assert Counter(run.info.status for run in runs) == {"FAILED": 2, "FINISHED": 2}
    assert Counter(run.data.tags[STATE] for run in runs)["failed"] == 2
    assert found.best.point["editor.mode"] in ("well", "once")
    rows = list(read_rows(parts(Workspace.of(out / "trials" / by_mode["once"].user_attrs["key"]))))
    assert len(rows) == len({row["edit_id"] for row in rows}) and {row["status"] for row in rows} == {"edited"}
    assert "2 failed" in found.markdown


@pytest.mark.parametrize("kind", ["empty", "other", "file"])
def test_a_folder_that_is_no_search_is_refused(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
    if kind == "other":
        (folder / "search.json").write_text('{"study": "table1"}')
    resumed = odedit("tune", "--resume", folder, "--config", written(values, tmp_path))
    expected = "is a file" if kind == "file" else "holds no search"
    assert resumed.exit_code == 2 and expected in resumed.stderr
    if kind != "empty":
        fresh = odedit("tune", "--out", folder, "--config", written(values, tmp_path))
        assert fresh.exit_code == 2 and ("is a file" in fresh.stderr or "is not empty" in fresh.stderr)
    both = odedit("tune", "--out", folder, "--resume", folder)
    assert both.exit_code == 2 and "give one of them" in both.stderr


def test_what_cannot_work_is_said_before_any_worker_starts(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = written(values, tmp_path)
    for place, (override, expected) in enumerate(
        {
            f"storage={tmp_path}/file/x": "storage: ",
            f"settings.tracking.uri=sqlite:///{tmp_path}/file/x.db": "tracking.uri: ",
            "rungs.edits=3": "rungs: the last one takes 12 validation records, and there are 8",
            "validation.path=none.json": "validation: data.path: there is no file",
            "evaluation.path=none.json": "evaluation: data.path: there is no file",
            "evaluation.image_root=none": "evaluation: ",
            "settings.pipeline.actors=2": "'concurrent' says how many run at a time",
        }.items()
    ):
        wrong = odedit("tune", "--config", config, override, "--out", tmp_path / f"out-{place}")
        assert wrong.exit_code == 2 and expected in wrong.stderr, (override, wrong.output, wrong.exception)
        assert "Traceback" not in wrong.output


def stop(*arguments: Any) -> Any:
    """Replaces the trials."""
    raise InputError("the search has begun")


def test_a_search_that_could_not_begin_is_tried_again_in_its_folder(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["settings"]["tracking"] = {"enabled": False}
    config, out = written(values, tmp_path), tmp_path / "above" / "out"
    (tmp_path / "file").write_text("")
    for override, expected in (
        ("validation.path=none.json", "there is no file"),
        ("rungs.edits=3", "there are 8 that can be used"),
        (f"storage={tmp_path}/file/x", "storage: "),
    ):
        wrong = odedit("tune", "--config", config, override, "--out", out)
        assert wrong.exit_code == 2 and expected in wrong.stderr, (override, wrong.output, wrong.exception)
        assert not out.parent.exists(), override
    monkeypatch.setattr(runner, "_run", stop)
    for seed in (1, 2):  # without a trial, other settings are accepted
        begun = odedit("tune", "--config", config, f"seed={seed}", "--out", out)
        assert begun.exit_code == 2 and "the search has begun" in begun.stderr, (begun.output, begun.exception)
    assert yaml.safe_load((out / "search.yaml").read_text())["seed"] == 2
    (out / "trials" / "0123456789abcdef").mkdir()
    other = odedit("tune", "--config", config, "seed=3", "--out", out)
    assert other.exit_code == 2 and "holds another search" in other.stderr
    (out / "search.json").unlink()
    stranger = odedit("tune", "--config", config, "--out", out)
    assert stranger.exit_code == 2 and "is not empty and holds no search" in stranger.stderr


def test_a_search_of_another_process_stays_where_this_one_is_refused(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes start at once: this one has made the folder, the other one holds its lock."""
    out = tmp_path / "out"

    @contextmanager
    def late(folder: Folder) -> Iterator[None]:
        with alone(folder):
            (out / "trials").mkdir()
            (out / "search.json").write_text("{}")
            with alone(folder):
                yield

    monkeypatch.setattr(runner, "alone", late)
    refused = odedit("tune", "--config", written(values, tmp_path), "--out", out)
    assert refused.exit_code == 2 and "is running (process " in refused.stderr, refused.output
    assert sorted(path.name for path in out.iterdir()) == ["search.json", "trials"]


def test_a_search_that_is_refused_deletes_nothing_of_the_one_that_runs(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other search has staged its records, and has no trial yet."""
    values["settings"]["tracking"] = {"enabled": False}
    config, out = written(values, tmp_path), tmp_path / "out"
    monkeypatch.setattr(runner, "_run", stop)
    assert "the search has begun" in odedit("tune", "--config", config, "seed=1", "--out", out).stderr
    later = [out / name for name in ("search.json", "search.yaml", "optuna.journal") if (out / name).exists()]
    staged = [path for path in (out / "validation").iterdir() if path.is_file()]
    assert out / "search.json" in later and out / "validation" / "rungs.parquet" in staged

    def refused() -> None:
        with alone(Folder.of(out)):
            second = odedit("tune", "--config", config, "seed=2", "--out", out)
        assert second.exit_code == 2 and "is running (process " in second.stderr, second.output

    refused()
    assert all(path.exists() for path in (*later, *staged))
    for path in later:
        path.unlink()
    refused()
    assert all(path.exists() for path in staged)


def test_passwords_are_not_kept_and_asked_for_again(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["settings"]["tracking"] = {"enabled": False}
    values["storage"] = "postgresql+psycopg://me:secret@127.0.0.1:1/name"
    config = written(values, tmp_path)
    out = tmp_path / "out"
    refused = odedit("tune", "--config", config, "--out", out)
    assert refused.exit_code == 2 and "no server answers at 'postgresql+psycopg://***@127" in refused.stderr
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "check_server", lambda *arguments: None)
        patch.setattr(runner, "Points", lambda *arguments: SimpleNamespace(trials=list))
        patch.setattr(runner, "_run", stop)
        assert "the search has begun" in odedit("tune", "--config", config, "--out", out).stderr
    assert not any("me:secret" in path.read_text() for path in out.glob("search.*"))
    again = odedit("tune", "--resume", out)
    assert again.exit_code == 2 and "add --config with the file" in again.stderr
    (tmp_path / "file").write_text("")
    moved = odedit("tune", "--resume", out, "--config", config, f"storage={tmp_path}/file/x", "trials=1")
    assert moved.exit_code == 2 and "/file/x' cannot be written to" in moved.stderr, "where it is kept may change"


def test_records_are_staged_once_and_those_of_a_finished_search_not_at_all(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged: list[str] = []
    original = staging._write

    def write(config: Any, *arguments: Any) -> None:
        staged.append(Path(config.data.path).stem)
        original(config, *arguments)

    monkeypatch.setattr(staging, "_write", write)
    monkeypatch.setattr(runner, "_run", lambda *arguments: "not reached in this test")
    out = tmp_path / "search"
    search = from_values(values | {"settings": values["settings"] | {"tracking": {"enabled": False}}})
    run(search, out, Console(quiet=True))
    assert staged == ["evaluation", "validation"]
    (out / "summary.json").write_text("{}")
    run(search, out, Console(quiet=True), resume=True)
    assert staged == ["evaluation", "validation"]
