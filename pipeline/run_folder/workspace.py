"""Paths in the folder of a run, and functions that read and write its JSON and Parquet files atomically."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.errors import InputError
from odedit.runtime.addresses import reason, relative_note
from odedit.storage.atomic import new_folder
from odedit.storage.location import Location, LocationLike, at

CONFIG_HEADER = "# odedit"
"""First words of a configuration that a run wrote; the code's version follows."""
STEP = "step"
"""Curve of a committed model that has the steps of the points of its other curves."""
_PATIENCE_AT_START_S = 5.0


@dataclass(frozen=True)
class Workspace:
    """Paths under `out`. On a cluster, `out` lies on storage that all nodes mount under the same name."""

    out: Location

    @classmethod
    def of(cls, out: LocationLike) -> Workspace:
        """The workspace at `out`. A path is made absolute, because workers have other current folders.

        Args:
            out: Path or address.

        Raises:
            InputError: pyarrow cannot read the address.
        """
        return cls(at(out, "out"))

    @property
    def records(self) -> Location:
        """Input records and the group of each; see `staging`."""
        return self.out / "records.parquet"

    @property
    def pool(self) -> Location:
        """Records that held-out supervision is drawn from."""
        return self.out / "pool.parquet"

    @property
    def results(self) -> Location:
        """Folder of the result rows; see `rows`."""
        return self.out / "results"

    @property
    def edits(self) -> Location:
        return self.out / "edits"

    @property
    def attempts(self) -> Location:
        """Folder of the counts of attempts at unfinished groups; see `pipeline.workers.attempts`."""
        return self.out / "attempts"

    @property
    def errors(self) -> Location:
        """Folder of tracebacks of unexpected errors and of the workers' warnings."""
        return self.out / "errors"

    @property
    def calibration(self) -> Location:
        """The MMD bandwidth `sigma2_0`, measured once per run."""
        return self.out / "calibration.json"

    @property
    def committed(self) -> Location:
        """Parameters of the model that the run commits its records to; see `odedit.ways.common.files`."""
        return self.out / "committed.safetensors"

    @property
    def training(self) -> Location:
        """State of an unfinished model."""
        return self.out / "training.safetensors"

    @property
    def moments(self) -> Location:
        """Folder of second moments of unedited activations, see `pipeline.workers.moments`."""
        return self.out / "moments"

    @property
    def progress(self) -> Location:
        """Progress of the worker that makes the model."""
        return self.out / "progress.json"

    @property
    def problem(self) -> Location:
        """Problem for which a worker could not make the model."""
        return self.out / "problem.json"

    @property
    def model(self) -> Location:
        """Folder of the committed model, as people serve it."""
        return self.out / "model"

    @property
    def run(self) -> Location:
        """Settings, inputs and MLflow run; compared with those of a resumed run."""
        return self.out / "run.json"

    @property
    def config(self) -> Location:
        return self.out / "config.yaml"

    @property
    def summary(self) -> Location:
        return self.out / "summary.json"

    @property
    def kept(self) -> Location:
        """Whether a scored model gives the pool's own answers; see `pipeline.workers.kept`."""
        return self.out / "kept.parquet"

    @property
    def text(self) -> Location:
        """NLL of a text before and after."""
        return self.out / "text.json"

    @property
    def profile(self) -> Location:
        return self.out / "profile.json"

    @property
    def report(self) -> Location:
        return self.out / "report.html"

    @property
    def adapter(self) -> Location:
        """Folder of the committed model as a PEFT adapter."""
        return self.out / "adapter"

    @property
    def written_models(self) -> tuple[Location, ...]:
        """Folders of the committed model: for serving, and as an adapter."""
        return self.model, self.adapter

    def further_table(self, name: str) -> Location:
        """A table that the way of a committed model writes (`odedit.ways.base.Committed.tables`)."""
        return self.out / f"{name}.parquet"

    def part(self, group: int) -> Location:
        """File of the result rows of one group."""
        return self.results / f"part-{group:06d}.parquet"

    def edit(self, edit_id: str) -> Location:
        return self.edits / f"{edit_id}.safetensors"

    @property
    def folders(self) -> tuple[Location, ...]:
        """Folders that a run creates."""
        return self.results, self.edits, self.attempts

    def create(self) -> None:
        """Creates the folders. Raises InputError if `out` cannot be written to."""
        try:
            for folder in self.folders:
                folder.make_folder()
        except OSError as error:
            raise InputError(f"out: {str(self.out)!r} cannot be written to: {reason(error)}.") from error


def new_local_folder(folder: Location, own: Collection[str] = ()) -> AbstractContextManager[None]:
    """`new_folder` if the location is a local path; no effect for an address, which has no folders."""
    return new_folder(Path(folder), own) if folder.is_local else nullcontext()


def check_access(folder: Location, setting: str) -> None:
    """Raises InputError if files cannot be written to and deleted from a folder or address.

    Leaves nothing behind: for a local folder that does not exist, its nearest existing parent is tested.

    Args:
        setting: Name of the setting or option that names the folder, for the message.
    """
    if folder.is_local:
        _check_local(Path(folder), setting)
        return
    test_file = (folder / f".access-{uuid.uuid4().hex[:8]}").with_patience(_PATIENCE_AT_START_S)
    try:
        test_file.write_bytes(b"odedit")
        test_file.delete()
    except OSError as error:
        raise InputError(
            f"{setting}: {folder} cannot be written to ({reason(error)}). Check the name and the credentials."
        ) from error


def _check_local(folder: Path, setting: str) -> None:
    above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    note = relative_note(str(folder))
    if not above.is_dir():
        below = "" if above == folder else f", so there can be no {str(folder)!r}"
        raise InputError(f"{setting}: {str(above)!r} is a file{below}. Choose another folder.{note}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".odedit-", dir=above))
    except OSError as error:
        why = f"{str(above)!r}: {reason(error)}"
        raise InputError(f"{setting}: {str(folder)!r} cannot be written to ({why}).{note}") from error


def write_json(location: Location, value: Any) -> None:
    location.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(location: Location) -> Any:
    """The file's content, or None if the file is missing or not valid JSON."""
    try:
        return json.loads(location.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_table(location: Location, table: pyarrow.Table) -> None:
    """Writes a Parquet file with page checksums, which `repair` verifies when a run is resumed."""
    data = pyarrow.BufferOutputStream()
    parquet.write_table(table, data, write_page_checksum=True)
    location.write_bytes(data.getvalue())


def write_rows(location: Location, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a Parquet file; a column that a row lacks is null there. No rows: no file."""
    names = dict.fromkeys(name for row in rows for name in row)
    if names:
        write_table(location, pyarrow.table({name: [row.get(name) for row in rows] for name in names}))


@contextmanager
def parquet_file(location: Location) -> Iterator[parquet.ParquetFile]:
    """A Parquet file, open inside the block."""
    with location.open() as stream, parquet.ParquetFile(stream) as file:
        yield file


def read_schema(location: Location) -> pyarrow.Schema:
    """Names and types of a Parquet file's columns."""
    with parquet_file(location) as file:
        return file.schema_arrow
