"""The run of the fault scenarios: its records, and ways to run it.

Every scenario runs the same command in its own folder `out`. The fault is chosen by files in a folder that the editor
watches, so rows and edits must equal those of the undisturbed run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from odedit.__main__ import app
from tests.faults.obedient import GROUP, HOLD
from tests.support import inline_pipeline
from tests.support.mmedit_files import record, write_array, write_images

ROOT = Path(__file__).resolve().parents[2]
EDITS = 12
SKIPPED = f"edit-{EDITS}"
PATIENCE_S = 180.0
ALL_DONE = f"{EDITS} edits, 0 failed, 1 skipped"


@dataclass(frozen=True)
class Ended:
    """Exit code, output and duration of a command."""

    code: int
    text: str
    seconds: float

    def expect(self, code: int, *parts: str) -> Ended:
        """Raises AssertionError unless the exit code is `code` and the output contains every part and no traceback."""
        assert self.code == code and all(part in self.text for part in parts), f"{self.code}, {parts}:\n{self.text}"
        assert "Traceback" not in self.text, self.text
        return self


class Bench:
    """Inputs, folders and commands of the scenarios.

    Args:
        quick: True runs commands in this process where no worker process is needed, without Ray, and times nothing.
    """

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        records = [record(number, edit_id=f"edit-{number:02d}") for number in range(EDITS)]
        image_root, rephrase_root = write_images(self.inputs, records)
        records.append(record(EDITS, edit_id=SKIPPED, alt=""))
        self.ids = [fields["edit_id"] for fields in records]
        self.config = folder / "run.yaml"
        values = {
            "data": {
                "path": str(write_array(self.inputs / "records.json", records)),
                "image_root": str(image_root),
                "rephrase_root": str(rephrase_root),
            },
            "supervision": {"locality_source": "record"},
            "editor": {
                "name": "tests.faults.obedient",
                "sites": ["layers.2.ffn.in"],
                "max_steps": 3,
                "learning_rate": 0.01,
                "orders": str(self.orders),
            },
            "objective": {"name": "native"},
            "evaluation": {"generate": False},
            "pipeline": {
                "batch_size": GROUP,
                "at_once": GROUP,
                "actors": 1,
                "threads_per_actor": 1,
                "preparers": 1,
                "device": "cpu",
            },
            "tracking": {"enabled": False},
        }
        self.config.write_text(yaml.safe_dump(values))
        self._references: dict[tuple[str, ...], Path] = {}

    def reference(self, *settings: str) -> Path:
        """Folder of a run without a fault, made in this process on first use."""
        if settings not in self._references:
            out = self.folder / f"reference-{len(self._references)}"
            self._inline(out, settings).expect(0, ALL_DONE)
            self._references[settings] = out
        return self._references[settings]

    def undisturbed(self, *settings: str, environment: Mapping[str, str] | None = None) -> float:
        """Seconds of a run without the fault; 0 if nothing is timed."""
        if self.quick:
            return 0.0
        out = self.folder / f"undisturbed-{time.monotonic_ns()}"
        return self.command(out, *settings, environment=environment).expect(0, ALL_DONE).seconds

    def edit(self, out: Path, *settings: str) -> Ended:
        """Runs `odedit edit`, in this process if the bench is quick."""
        return self._inline(out, settings) if self.quick else self.command(out, *settings)

    def command(self, out: Path, *settings: str, environment: Mapping[str, str] | None = None) -> Ended:
        """Runs `odedit edit` as a process, with its own Ray unless a setting names another."""
        return _ended(self.started(out, *settings, environment=environment))

    def started(self, out: Path, *settings: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Starts `odedit edit` as a process."""
        return self._started(self._arguments(out, settings), os.environ if environment is None else environment)

    def _started(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "odedit", *arguments],
            cwd=self.folder,
            env={**environment, **PYTHON_PATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def odedit(self, *arguments: object) -> Ended:
        """Runs another command of odedit."""
        if self.quick:
            return odedit(*arguments)
        return _ended(self._started([str(argument) for argument in arguments], os.environ))

    def _inline(self, out: Path, settings: Sequence[str]) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            inline_pipeline.install(patch)
            return odedit(*self._arguments(out, settings))

    def _arguments(self, out: Path, settings: Sequence[str]) -> list[str]:
        return ["edit", "--config", str(self.config), f"out={out}", *settings]

    @contextmanager
    def ordered(self, *orders: str) -> Iterator[None]:
        """Gives the editor orders inside the block."""
        for order in orders:
            (self.orders / order).touch()
        try:
            yield
        finally:
            for path in self.orders.iterdir():
                path.unlink(missing_ok=True)

    @contextmanager
    def held(self, happens: Callable[[int], object]) -> Iterator[None]:
        """Holds the second group in the middle of its edits, inside the block, until `happens` returns.

        Args:
            happens: Called in a thread with the number of the editing process.
        """
        with self.ordered(HOLD):

            def meanwhile() -> None:
                try:
                    happens(self.wait_for_worker())
                finally:
                    (self.orders / HOLD).unlink(missing_ok=True)

            with _beside(meanwhile):
                yield

    def wait_for_worker(self) -> int:
        """Waits for a process to be held in the second group, and returns its number."""
        signs: list[Path] = []
        wait_until(lambda: signs.extend(self.orders.glob("at-*")) or signs, "the second group is begun")
        return int(signs[0].name.rpartition("-")[2])


PYTHON_PATH = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


def _ended(process: subprocess.Popen[str]) -> Ended:
    begun = time.monotonic()
    text, _ = process.communicate(timeout=2 * PATIENCE_S)
    return Ended(process.returncode, text, time.monotonic() - begun)


def odedit(*arguments: object) -> Ended:
    """Runs a command in this process."""
    begun = time.monotonic()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return Ended(result.exit_code, result.output, time.monotonic() - begun)


@contextmanager
def _beside(work: Callable[[], object]) -> Iterator[None]:
    """Runs `work` in a thread during the block, and raises its error at the end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(2 * PATIENCE_S)
        if errors:
            raise errors[0]


def wait_until(condition: Callable[[], object], what: str) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < PATIENCE_S, f"timed out waiting until {what}"
        time.sleep(0.05)


def workers_of(driver: int) -> list[psutil.Process]:
    """Worker processes of a driver with its own Ray."""
    family = psutil.Process(driver).children(recursive=True)
    return [process for process in family if re.match(r"ray::.*(Prepare|Edit)Stage", _title(process))]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # the process has just ended
        return ""


def wait_until_gone(processes: Sequence[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, PATIENCE_S)
    assert not left, left
