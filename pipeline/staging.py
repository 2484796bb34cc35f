"""Reads the input once, before any worker starts, into groups of edits that never change afterwards.

A group is the unit of scheduling, of retry and of output. Its members depend on the input and on `batch_size` alone,
so the number of workers, crashes and resumed runs change no result. A group holds the unusable records between its
members too: a result file has one row per input record. `records.parquet` says of every record which group it is in;
a row group of the file holds many groups, since a reader keeps what describes every row group in memory.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from odedit.addresses import masked
from odedit.errors import InputError
from odedit.locations import Location, locate
from odedit.mmedit import RawRecord, read_records
from odedit.pack_format import RECORDS_SCHEMA
from odedit.pool import Pool
from pipeline.config import RunConfig
from pipeline.sources import Sources
from pipeline.workspace import Workspace, parquet_file, read_schema, write_table

POOL_RECORDS = 256
STAGED_SCHEMA = RECORDS_SCHEMA.append(pyarrow.field("group", pyarrow.int64())).with_metadata({"odedit": "staged"})
"""Marked, so that a user's own Parquet file of the same name is never taken for one that may be deleted."""
_PROBLEMS_PER_GROUP = 2000
_ROWS_TOGETHER = 512


@dataclass(frozen=True)
class Staged:
    """What the input holds.

    Attributes:
        usable: Usable records of every group.
        records: Records of every group, the unusable ones included.
    """

    usable: tuple[int, ...]
    records: tuple[int, ...]

    @property
    def num_usable(self) -> int:
        return sum(self.usable)

    @property
    def problems(self) -> int:
        """Unusable records in all."""
        return sum(self.records) - self.num_usable

    def size(self, group: int) -> int:
        """Records of one group; none if there is no such group."""
        return self.records[group] if group < len(self.records) else 0


def stage(config: RunConfig, sources: Sources, workspace: Workspace) -> Staged:
    """Writes `records.parquet` and `pool.parquet` unless they are there and whole.

    Raises:
        InputError: The input cannot be read, or held-out locality or hard negatives need a pool and there is none.
    """
    if sources.pool is None and config.objective.settings.num_negatives:
        raise InputError(
            f"objective.name: {config.objective.name!r} compares an edit with pictures of other records, and there are "
            "none. Set data.pool to a file of other records (the training file)."
        )
    if sources.pool is not None and not _is_staged(workspace.pool):
        _stage_pool(config, sources, workspace.pool)
    if not (_is_staged(workspace.records) and "group" in read_schema(workspace.records).names):
        workspace.records.write_with(lambda path: _write(config, sources, path))
    return read_staged(workspace.records)


@contextmanager
def aside(config: RunConfig, sources: Sources, workspace: Workspace) -> Iterator[None]:
    """Stages beside what is there, and takes the place of it after the block: wrong input costs no earlier result.

    Raises:
        InputError: As `stage` does, before the block is entered.
    """
    beside = workspace.out if workspace.out.is_local else None
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=beside) as folder:
        new = Workspace(locate(folder, "out"))
        stage(config, sources, new)
        yield
        for name in ("records", "pool"):
            if getattr(new, name).exists():
                getattr(workspace, name).take(Path(getattr(new, name)))


def remove_leftovers(workspace: Workspace) -> None:
    """Deletes what a run staged or measured before it failed: the input may be another one by now.

    Raises:
        InputError: A file of one of these names is there that no run wrote.
    """
    found = [path for path in (workspace.records, workspace.pool) if path.exists()]
    for path in found:
        if not _is_staged(path):
            raise InputError(
                f"out: {path} was not written by a run and would be replaced. Choose another folder (out=...)."
            )
    for path in found:
        path.delete()
    workspace.calibration.delete()


def _is_staged(place: Location) -> bool:
    try:
        metadata = read_schema(place).metadata or {}
    except (pyarrow.ArrowException, OSError):
        return False
    return bool(metadata.get(b"odedit") == b"staged")


def _write(config: RunConfig, sources: Sources, path: Path) -> None:
    sources.reader.check_roots()
    has_pool = sources.pool is not None
    rows: list[dict[str, Any]] = []
    num_rows = 0
    with parquet.ParquetWriter(path, STAGED_SCHEMA) as writer:
        records = read_records(sources.path, task=config.data.task, limit=config.data.limit)
        for number, group in enumerate(_groups(records, config.pipeline.batch_size)):
            if not has_pool:
                for record in group:
                    _check_locality(record, config)
            rows += (record.to_row() | {"group": number} for record in group)
            num_rows += len(group)
            if len(rows) >= _ROWS_TOGETHER:
                _write_rows(writer, rows)
                rows = []
        _write_rows(writer, rows)
    if not num_rows:
        raise InputError(f"data.path: {masked(config.data.path)} holds no record.")


def _write_rows(writer: parquet.ParquetWriter, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        table = pyarrow.Table.from_pylist(rows, schema=STAGED_SCHEMA)
        writer.write_table(table, row_group_size=len(rows))


def _groups(records: Iterator[RawRecord], batch_size: int) -> Iterator[list[RawRecord]]:
    group: list[RawRecord] = []
    num_usable = 0
    for record in records:
        group.append(record)
        num_usable += not record.problem
        if num_usable == batch_size or len(group) - num_usable >= _PROBLEMS_PER_GROUP:
            yield group
            group, num_usable = [], 0
    if group:
        yield group


def _check_locality(record: RawRecord, config: RunConfig) -> None:
    """Without a pool every record must bring its own unrelated questions: better said once, before the run."""
    supervision = config.supervision
    if record.problem or supervision.locality_source == "record":
        return
    missing = [
        slot for slot in ("text_locality", "image_locality") if slot not in (record.fields.get("held_out") or {})
    ]
    if missing:
        raise InputError(
            f"{record.file}, record {record.index}: has no held-out entry for {' and '.join(missing)}, and data.pool "
            "is not set. Set data.pool to a file of other records (the training file), or supervision.locality_source "
            "to 'record', which trains on the questions that locality is scored on."
        )


def _stage_pool(config: RunConfig, sources: Sources, place: Location) -> None:
    assert sources.pool is not None
    pool = Pool.sample(
        sources.pool, sources.pool_reader, size=POOL_RECORDS, seed=config.supervision.seed, task=config.data.task
    )
    rows = [record.to_row() | {"group": 0} for record in pool.records]
    write_table(place, pyarrow.Table.from_pylist(rows, schema=STAGED_SCHEMA))


def read_pool(workspace: Workspace, sources: Sources) -> Pool | None:
    """The staged pool, or None if the run has none."""
    if not workspace.pool.exists():
        return None
    with parquet_file(workspace.pool) as file:
        rows = file.read().to_pylist()
    return Pool(tuple(RawRecord.from_row(row) for row in rows), sources.pool_reader)


def read_staged(place: Location) -> Staged:
    """Counts the records of every group; reads two columns."""
    usable: list[int] = []
    records: list[int] = []
    with parquet_file(place) as file:
        for batch in file.iter_batches(columns=["group", "problem"]):
            for group, problem in zip(*(batch.column(name).to_pylist() for name in ("group", "problem")), strict=True):
                for counts in (usable, records):
                    counts += [0] * (group + 1 - len(counts))
                usable[group] += not problem
                records[group] += 1
    return Staged(tuple(usable), tuple(records))


class GroupReader:
    """Reads single groups; made for asking in about their order, and keeps the row group of the last one.

    Args:
        place: `records.parquet`, opened with the first group.
    """

    def __init__(self, place: Location) -> None:
        self._place = place
        self._last_groups: list[int] = []
        self._kept: tuple[int, pyarrow.Table] | None = None

    def __call__(self, group: int) -> list[RawRecord]:
        """The records of one group, the unusable ones included, in the order of the input."""
        table = self._row_group(group)
        numbers = table.column("group").to_numpy()
        first, end = np.searchsorted(numbers, (group, group + 1))
        return [RawRecord.from_row(row) for row in table.slice(first, end - first).to_pylist()]

    def _row_group(self, group: int) -> pyarrow.Table:
        if not self._last_groups:
            with parquet_file(self._place) as file:
                metadata = file.metadata
            column = metadata.schema.names.index("group")
            self._last_groups = [
                metadata.row_group(index).column(column).statistics.max for index in range(metadata.num_row_groups)
            ]
        index = bisect_left(self._last_groups, group)
        if self._kept is None or self._kept[0] != index:
            with parquet_file(self._place) as file:
                self._kept = index, file.read_row_group(index)
        return self._kept[1]


def usable_records(place: Location) -> Iterator[RawRecord]:
    """The usable records from the start, some at a time."""
    with parquet_file(place) as file:
        for batch in file.iter_batches(batch_size=_ROWS_TOGETHER):
            yield from (RawRecord.from_row(row) for row in batch.to_pylist() if not row["problem"])
