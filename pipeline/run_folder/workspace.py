"""The folder of a run: what lies where, and writes that a reader sees whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.errors import InputError
from odedit.runtime.addresses import reason, relative_note
from odedit.storage.atomic import new_folder
from odedit.storage.location import Location, Place, at

CONFIG_HEADER = "# odedit"
"""How a configuration that a run wrote begins; a version follows."""
_PATIENCE_AT_START_S = 5.0


@dataclass(frozen=True)
class Workspace:
    """Places under `out`. On a cluster it lies on storage that all nodes see under the same name."""

    out: Location

    @classmethod
    def of(cls, out: Place) -> Workspace:
        """The workspace at `out`, a path or an address; a path is made absolute because workers run elsewhere.

        Raises:
            InputError: The address is none that pyarrow reads.
        """
        return cls(at(out, "out"))

    @property
    def records(self) -> Location:
        """Every input record, one row group for each group of edits."""
        return self.out / "records.parquet"

    @property
    def pool(self) -> Location:
        return self.out / "pool.parquet"

    @property
    def results(self) -> Location:
        return self.out / "results"

    @property
    def edits(self) -> Location:
        return self.out / "edits"

    @property
    def attempts(self) -> Location:
        return self.out / "attempts"

    @property
    def errors(self) -> Location:
        """Tracebacks of unexpected errors, for developers, and what else a worker has to say."""
        return self.out / "errors"

    @property
    def calibration(self) -> Location:
        return self.out / "calibration.json"

    @property
    def run(self) -> Location:
        """What the run is, for resuming it."""
        return self.out / "run.json"

    @property
    def config(self) -> Location:
        return self.out / "config.yaml"

    @property
    def summary(self) -> Location:
        return self.out / "summary.json"

    @property
    def profile(self) -> Location:
        return self.out / "profile.json"

    @property
    def report(self) -> Location:
        return self.out / "report.html"

    def part(self, group: int) -> Location:
        """The result rows of one group of edits."""
        return self.results / f"part-{group:06d}.parquet"

    def edit(self, edit_id: str) -> Location:
        return self.edits / f"{edit_id}.safetensors"

    @property
    def folders(self) -> tuple[Location, ...]:
        """The folders that a run fills."""
        return self.results, self.edits, self.attempts

    def create(self) -> None:
        """Makes the folders. Raises InputError if that is not possible."""
        try:
            for folder in self.folders:
                folder.make_folder()
        except OSError as error:
            raise InputError(f"out: {str(self.out)!r} cannot be written to: {reason(error)}.") from error


def new_place(folder: Location, own: Collection[str] = ()) -> AbstractContextManager[None]:
    """`new_folder` for a folder or an address, where names are enough and there is no folder to be made."""
    return new_folder(Path(folder), own) if folder.is_local else nullcontext()


def check_access(folder: Location, setting: str) -> None:
    """Raises InputError if a folder cannot be made, written to and deleted from: better said before any work.

    Nothing stays behind: of a local folder that is not there, the one above it is tried.
    """
    if folder.is_local:
        _check_local(Path(folder), setting)
        return
    probe = (folder / f".access-{uuid.uuid4().hex[:8]}").with_patience(_PATIENCE_AT_START_S)
    try:
        probe.write_bytes(b"odedit")
        probe.delete()
    except OSError as error:
        raise InputError(
            f"{setting}: {folder} cannot be written to ({reason(error)}). Check the name and the credentials."
        ) from error


def _check_local(folder: Path, setting: str) -> None:
    above = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    note = relative_note(str(folder))
    if not above.is_dir():
        below = "" if above == folder else f", so there can be no {str(folder)!r}"
        raise InputError(f"{setting}: {str(above)!r} is a file{below}. Choose another folder.{note}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".odedit-", dir=above))
    except OSError as error:
        why = f"{str(above)!r}: {reason(error)}"
        raise InputError(f"{setting}: {str(folder)!r} cannot be written to ({why}).{note}") from error


def write_json(place: Location, value: Any) -> None:
    place.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(place: Location) -> Any:
    """The file's content, or None if it is not there or was cut off."""
    try:
        return json.loads(place.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_table(place: Location, table: pyarrow.Table) -> None:
    """Writes a Parquet file, with checksums: what is damaged afterwards is found when a run is resumed."""
    data = pyarrow.BufferOutputStream()
    parquet.write_table(table, data, write_page_checksum=True)
    place.write_bytes(data.getvalue())


@contextmanager
def parquet_file(place: Location) -> Iterator[parquet.ParquetFile]:
    """A Parquet file that is open inside the block."""
    with place.open() as stream, parquet.ParquetFile(stream) as file:
        yield file


def read_schema(place: Location) -> pyarrow.Schema:
    """The columns of a Parquet file."""
    with parquet_file(place) as file:
        return file.schema_arrow
