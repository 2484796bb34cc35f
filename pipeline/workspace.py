"""The folder of a run: what lies where, and writes that a reader sees whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odedit.errors import InputError
from odedit.files import temporary_beside
from odedit.files import write_atomically as write_atomically

CONFIG_HEADER = "# odedit"
"""How a configuration that a run wrote begins; a version follows."""


@dataclass(frozen=True)
class Workspace:
    """Paths under `out`. On a cluster it lies on storage that all nodes see under the same name."""

    out: Path

    @classmethod
    def of(cls, out: str) -> Workspace:
        """The workspace at `out`, a local path; made absolute because workers run elsewhere."""
        if "://" in out:
            raise InputError(f"out: got {out!r}, expected a folder on a file system that this machine has mounted.")
        return cls(Path(out).expanduser().absolute())

    @property
    def records(self) -> Path:
        """Every input record, one row group for each group of edits."""
        return self.out / "records.parquet"

    @property
    def pool(self) -> Path:
        return self.out / "pool.parquet"

    @property
    def results(self) -> Path:
        return self.out / "results"

    @property
    def edits(self) -> Path:
        return self.out / "edits"

    @property
    def attempts(self) -> Path:
        return self.out / "attempts"

    @property
    def errors(self) -> Path:
        """Tracebacks of unexpected errors, for developers, and what else a worker has to say."""
        return self.out / "errors"

    @property
    def calibration(self) -> Path:
        return self.out / "calibration.json"

    @property
    def run(self) -> Path:
        """What the run is, for resuming it."""
        return self.out / "run.json"

    @property
    def config(self) -> Path:
        return self.out / "config.yaml"

    @property
    def summary(self) -> Path:
        return self.out / "summary.json"

    @property
    def profile(self) -> Path:
        return self.out / "profile.json"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    def part(self, group: int) -> Path:
        """The result rows of one group of edits."""
        return self.results / f"part-{group:06d}.parquet"

    def edit(self, edit_id: str) -> Path:
        return self.edits / f"{edit_id}.safetensors"

    def create(self) -> None:
        """Makes the folders. Raises InputError if that is not possible."""
        try:
            for folder in (self.results, self.edits, self.attempts):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out: {str(self.out)!r} cannot be written to: {error.strerror}.") from error


def write_once(path: Path, text: str) -> None:
    """Writes a file unless it is there; of several writers at once the first wins, and all read the same afterwards."""
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # no hard links on this file system: the narrow race that is left does no harm
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The file's content, or None if it is not there or was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
