"""The lock of a run's folder: a second command there is refused, and a killed one leaves no lock behind."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from odedit import world
from odedit.__main__ import app
from odedit.errors import InputError
from pipeline.config.run import from_dict
from pipeline.driver import run as driver
from pipeline.driver.run import Outcome, run
from pipeline.run_folder import lock
from tests.pipeline.conftest import QUIET

Inline = Callable[..., Outcome]
CHECKPOINT = Path(world.__file__).parent / "checkpoints" / "blip2"

HOLDER = """
import sys, time
from pipeline.run_folder.lock import alone
with alone(sys.argv[1], "out"):
    print("held", flush=True)
    time.sleep(600)
"""


def held_by_another(out: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def odedit(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_command_in_a_folder_is_refused_until_the_first_is_killed(
    settings: dict[str, Any], tmp_path: Path, inline: Inline
) -> None:
    out = Path(inline(from_dict(settings)).workspace.out)
    assert not (out / lock.LOCK).exists()
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings | {"seed": 1}))
    given = ("--config", str(config), "--fresh")
    holder = held_by_another(out)
    try:
        before = files_in(out)
        for command in (("edit",), ("commit", "commit.way=sum", "editor={name: ftl}"), ("score", str(CHECKPOINT))):
            refused = odedit(*command, *given)
            expected = f"out: a command that writes to {out} is running (process {holder.pid})."
            assert refused.exit_code == 2 and expected in refused.stderr, (command, refused.output, refused.exception)
        assert files_in(out) == before
        plan = odedit("edit", "--dry-run", *given)
        assert plan.exit_code == 0, plan.output
    finally:
        holder.kill()
        holder.wait()
    assert (out / lock.LOCK).exists(), "the killed process has left the file"
    done = odedit("edit", *given)
    assert done.exit_code == 0, (done.output, done.exception)
    assert not (out / lock.LOCK).exists()


def test_what_a_killed_command_left_does_not_make_a_folder_anothers(settings: dict[str, Any], inline: Inline) -> None:
    out = Path(settings["out"])
    out.mkdir()
    (out / lock.LOCK).write_text("1")
    assert run(from_dict(settings), QUIET, fresh=True).summary["n"] == 5


def test_runs_hold_their_folders_until_the_last_one_has_ended(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [from_dict(settings | {"out": str(tmp_path / name)}) for name in ("one", "two")]

    def edits(ready: Any, *arguments: Any, **named: Any) -> Any:
        for each in ready:
            with pytest.raises(InputError, match="is running"), lock.alone(each.workspace.out, "out"):
                pass
        raise KeyError("enough")

    monkeypatch.setattr(driver, "_run_ready", edits)
    with pytest.raises(KeyError, match="enough"):
        driver.run_many(configs, QUIET)
    with pytest.raises(KeyError, match="enough"):
        run(configs[0], QUIET)
    for config in configs:
        with lock.alone(config.out, "out"):
            assert (Path(config.out) / lock.LOCK).exists()
        assert not (Path(config.out) / lock.LOCK).exists()


def test_a_new_folder_stays_only_if_something_is_written_to_it(tmp_path: Path) -> None:
    out = tmp_path / "above" / "out"
    with pytest.raises(KeyError), lock.alone(out, "out"):
        raise KeyError
    assert not out.parent.exists()
    with pytest.raises(KeyError), lock.alone(out, "out"):
        (out / "run.json").write_text("{}")
        raise KeyError
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.alone(tmp_path, "out"):
        assert not list(tmp_path.iterdir())


def test_an_address_has_a_lock_on_this_machine(bucket: Any) -> None:
    with lock.alone("s3://odedit/run", "out"):
        with (
            pytest.raises(InputError, match=r"s3://odedit/run is running \(process \d+\)"),
            lock.alone("s3://odedit/run", "out"),
        ):
            pass
        with lock.alone("s3://odedit/other", "out"):
            pass
    with lock.alone("s3://odedit/run", "out"):
        pass
