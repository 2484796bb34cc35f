"""Reads the input once, before any worker starts, into groups of edits that never change afterwards.

A group is the unit of scheduling, of retry and of output. Its members depend on the input and on `batch_size` alone,
so the number of workers, crashes and resumed runs change no result. Each group is one row group of `records.parquet`,
together with the unusable records between its members: a result file has one row per input record.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.errors import InputError
from odedit.locations import masked
from odedit.mmedit import RawRecord, read_records
from odedit.pack_format import RECORDS_SCHEMA
from odedit.pool import Pool
from pipeline.config import RunConfig
from pipeline.sources import Sources
from pipeline.workspace import Workspace, write_atomically

POOL_RECORDS = 256
STAGED_SCHEMA = RECORDS_SCHEMA.with_metadata({"odedit": "staged"})
"""Marked, so that a user's own Parquet file of the same name is never taken for one that may be deleted."""
_PROBLEMS_PER_GROUP = 2000


@dataclass(frozen=True)
class Staged:
    """What the input holds.

    Attributes:
        usable: Usable records of every group.
        problems: Unusable records in all.
    """

    usable: tuple[int, ...]
    problems: int

    @property
    def num_usable(self) -> int:
        return sum(self.usable)


def stage(config: RunConfig, sources: Sources, workspace: Workspace) -> Staged:
    """Writes `records.parquet` and `pool.parquet` unless they are there.

    Raises:
        InputError: The input cannot be read, or held-out locality needs a pool and there is none.
    """
    if not workspace.pool.exists() and sources.pool is not None:
        _stage_pool(config, sources, workspace.pool)
    if not workspace.records.exists():
        write_atomically(workspace.records, lambda path: _write(config, sources, path))
    return read_staged(workspace.records)


@contextmanager
def aside(config: RunConfig, sources: Sources, workspace: Workspace) -> Iterator[None]:
    """Stages beside what is there, and takes the place of it after the block: wrong input costs no earlier result.

    Raises:
        InputError: As `stage` does, before the block is entered.
    """
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=workspace.out) as folder:
        new = Workspace(Path(folder))
        stage(config, sources, new)
        yield
        for name in ("records", "pool"):
            if getattr(new, name).exists():
                os.replace(getattr(new, name), getattr(workspace, name))


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
        path.unlink(missing_ok=True)
    workspace.calibration.unlink(missing_ok=True)


def _is_staged(path: Path) -> bool:
    try:
        metadata = parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError):
        return False
    return bool(metadata.get(b"odedit") == b"staged")


def _write(config: RunConfig, sources: Sources, path: Path) -> None:
    sources.reader.check_roots()
    has_pool = sources.pool is not None
    num_groups = 0
    writer = parquet.ParquetWriter(path, STAGED_SCHEMA)
    try:
        records = read_records(sources.path, task=config.data.task, limit=config.data.limit)
        for group in _groups(records, config.pipeline.batch_size):
            if not has_pool:
                for record in group:
                    _check_locality(record, config)
            table = pyarrow.Table.from_pylist([record.to_row() for record in group], schema=STAGED_SCHEMA)
            writer.write_table(table, row_group_size=len(group))
            num_groups += 1
    finally:
        writer.close()
    if not num_groups:
        raise InputError(f"data.path: {masked(config.data.path)} holds no record.")


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


def _stage_pool(config: RunConfig, sources: Sources, path: Path) -> None:
    assert sources.pool is not None
    pool = Pool.sample(
        sources.pool, sources.pool_reader, size=POOL_RECORDS, seed=config.supervision.seed, task=config.data.task
    )
    table = pyarrow.Table.from_pylist([record.to_row() for record in pool.records], schema=STAGED_SCHEMA)
    write_atomically(path, lambda temporary: parquet.write_table(table, temporary))


def read_pool(workspace: Workspace, sources: Sources) -> Pool | None:
    """The staged pool, or None if the run has none."""
    if not workspace.pool.exists():
        return None
    rows = parquet.read_table(workspace.pool).to_pylist()
    return Pool(tuple(RawRecord.from_row(row) for row in rows), sources.pool_reader)


def read_staged(path: Path) -> Staged:
    """Counts the groups; reads one column."""
    file = parquet.ParquetFile(path)
    usable, problems = [], 0
    for index in range(file.metadata.num_row_groups):
        column = file.read_row_group(index, columns=["problem"]).column("problem").to_pylist()
        usable.append(sum(not problem for problem in column))
        problems += len(column) - usable[-1]
    return Staged(tuple(usable), problems)


def read_group(path: Path | str, group: int) -> list[RawRecord]:
    """The records of one group, the unusable ones included, in the order of the input."""
    rows: Sequence[dict[str, Any]] = parquet.ParquetFile(path).read_row_group(group).to_pylist()
    return [RawRecord.from_row(row) for row in rows]


def usable_records(path: Path) -> Iterator[RawRecord]:
    """The usable records from the start, read a group at a time."""
    for group in range(parquet.ParquetFile(path).metadata.num_row_groups):
        yield from (record for record in read_group(path, group) if not record.problem)
