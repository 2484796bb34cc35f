"""`odedit commit` on a Ray of its own, with two workers: killed and started again it ends with the same model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace
from tests.support.paths import ROOT

pytestmark = pytest.mark.ray
_LONGEST_S = 300


@pytest.fixture
def command(settings: dict[str, Any], tmp_path: Path) -> Callable[[str], list[str]]:
    """Arguments of the command with `out` as the folder of that name."""
    values = {key: value for key, value in settings.items() if key != "editor"} | {
        "objective": {"name": "native"},
        "commit": {"steps": 40, "copies": 1, "check_every": 2, "records": 4},
        "pipeline": {"batch_size": 2, "actors": 2},
        "evaluation": {"generate": False, "mmedit": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return lambda name: [
        sys.executable, "-m", "odedit", "commit", "--config", str(path), f"out={tmp_path / name}",
    ]  # fmt: skip


def started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LONGEST_S
    while not file.exists():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline, f"{file} was not written"
        time.sleep(0.05)


def end_with(process: subprocess.Popen[bytes]) -> None:
    """Kills the command; Ray's processes end with it."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=60)
    for child in children:
        if child.is_running():
            child.kill()


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Training workers below the command."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(child.cmdline()) or "TrainWorker" in child.name():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def result_of(out: Path) -> tuple[bytes, list[str]]:
    rows = results.read_rows(results.parts(Workspace.of(str(out))))
    return (out / "model" / "model.safetensors").read_bytes(), [results.to_json_row(row) for row in rows]


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=_LONGEST_S)
    assert process.returncode == 0, errors.decode()


def test_a_killed_command_and_a_killed_worker_change_nothing(
    command: Callable[[str], list[str]], tmp_path: Path
) -> None:
    finished(started(command("whole")))
    whole = result_of(tmp_path / "whole")

    process = started(command("killed"))
    wait_for(tmp_path / "killed" / "training.safetensors", process)
    end_with(process)
    finished(started(command("killed")))
    assert result_of(tmp_path / "killed") == whole

    process = started(command("worker"))
    wait_for(tmp_path / "worker" / "training.safetensors", process)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    finished(process)
    assert result_of(tmp_path / "worker") == whole
    assert not (tmp_path / "worker" / ".ray-train").exists()


def test_a_killed_bulk_commit_reads_no_share_of_the_pool_twice_and_ends_with_the_same_model(
    command: Callable[[str], list[str]], tmp_path: Path
) -> None:
    bulk = ["commit={way: bulk, copies: 1, pool_copies: 0, candidates: 4}", "objective={name: native}"]
    finished(started([*command("whole"), *bulk]))
    whole = result_of(tmp_path / "whole")
    (folder,) = (tmp_path / "whole" / "moments").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [f"share-{n}-of-2.safetensors" for n in (0, 1)]

    process = started([*command("killed"), *bulk])
    share = tmp_path / "killed" / "moments" / folder.name / "share-0-of-2.safetensors"
    wait_for(share, process)
    end_with(process)
    before = share.stat().st_mtime_ns
    finished(started([*command("killed"), *bulk]))
    assert share.stat().st_mtime_ns == before
    assert result_of(tmp_path / "killed") == whole
