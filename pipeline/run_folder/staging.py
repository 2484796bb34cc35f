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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from odedit import editors
from odedit.backbones import load_processor
from odedit.data.fields import control_token_problem
from odedit.data.packed import RECORDS_SCHEMA
from odedit.data.pool import Pool
from odedit.data.records import Check, RawRecord, read_records
from odedit.data.supervision import check_pool
from odedit.errors import InputError
from odedit.inputs.batch import LOCALITY_SLOTS
from odedit.inputs.markers import control_token_finder
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, locate
from pipeline.config.run import RunConfig
from pipeline.run_folder.pictures import check_pictures
from pipeline.run_folder.reasons import Reasons
from pipeline.run_folder.sources import Sources
from pipeline.run_folder.workspace import Workspace, parquet_file, read_schema, write_table

POOL_RECORDS = 256
STAGED_SCHEMA = RECORDS_SCHEMA.append(pyarrow.field("group", pyarrow.int64())).with_metadata({"odedit": "staged"})
"""Marked, so that a user's own Parquet file of the same name is never taken for one that may be deleted."""
_PROBLEMS_PER_GROUP = 2000
_ASIDE = ".staging-"
_ROWS_TOGETHER = 512


@dataclass(frozen=True)
class Staged:
    """What the input holds.

    Attributes:
        usable: Usable records of every group.
        records: Records of every group, the unusable ones included.
        reasons: The commonest reasons why records are unusable, as `Reasons.commonest` gives them.
    """

    usable: tuple[int, ...]
    records: tuple[int, ...]
    reasons: tuple[dict[str, Any], ...] = field(default=(), compare=False)

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
        InputError: The input cannot be read, none of its pictures is there, or held-out locality or hard negatives need
            a pool and there is none, or one whose records can supervise none of the run's.
    """
    if sources.pool is None and config.objective.settings.num_negatives:
        raise InputError(
            f"objective.name: {config.objective.name!r} compares an edit with pictures of other records, and there are "
            "none. Set data.pool to a file of other records (the training file)."
        )
    needs_pool = sources.pool is not None and not _is_staged(workspace.pool)
    needs_records = not (_is_staged(workspace.records) and "group" in read_schema(workspace.records).names)
    if needs_pool or needs_records:
        check = check_for(load_processor(config.backbone.family, config.backbone.checkpoint).tokenizer)
        if needs_records:
            sources.reader.check_roots()
            check_pictures(_records(config, sources, check), sources.reader)
        if needs_pool:
            _stage_pool(config, sources, workspace.pool, check)
        if needs_records:
            _check_supervision(config, sources, read_pool(workspace, sources), check)
            workspace.records.write_with(lambda path: _write(config, sources, path, check))
    return read_staged(workspace.records)


def check_for(tokenizer: Any) -> Check:
    """The check of records that a model with this tokenizer needs."""
    return partial(control_token_problem, find=control_token_finder(tokenizer))


def reads_locality(config: RunConfig) -> bool:
    """Whether edits of the run are made from locality supervision. If not, no pool is needed."""
    editor = editors.find(config.editor.name)(config.editor.settings)
    return not config.objective.settings.reads(editor).isdisjoint(LOCALITY_SLOTS)


def _check_supervision(config: RunConfig, sources: Sources, pool: Pool | None, check: Check) -> None:
    """Raises InputError if the pool is of no use, said once instead of in every row."""
    if pool is None or not reads_locality(config):
        return
    usable = (record for record in _records(config, sources, check) if not record.problem)
    check_pool(usable, sources.reader, config.supervision, pool)


@contextmanager
def aside(config: RunConfig, sources: Sources, workspace: Workspace) -> Iterator[Staged]:
    """Stages beside what is there, and takes the place of it after the block: wrong input costs no earlier result.

    Nothing is left in the folder if the input is wrong or the block fails.

    Raises:
        InputError: As `stage` does, before the block is entered.
    """
    beside = workspace.out if workspace.out.is_local else None
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=beside) as folder:
        new = Workspace(locate(folder, "out"))
        yield stage(config, sources, new)
        for name in ("records", "pool"):
            if getattr(new, name).exists():
                getattr(workspace, name).take(Path(getattr(new, name)))


def leftovers(workspace: Workspace) -> list[Location]:
    """Files of a run that failed before its first result. The caller deletes them, since the input may have changed.

    Raises:
        InputError: A file of one of these names is there that no run wrote.
    """
    found = [path for path in (workspace.records, workspace.pool) if path.exists()]
    for path in found:
        if not _is_staged(path):
            raise InputError(
                f"out: {path} was not written by a run and would be replaced. Choose another folder (out=...)."
            )
    return [*found, *([workspace.calibration] if workspace.calibration.exists() else [])]


def cut_off(workspace: Workspace) -> list[Location]:
    """Files that `aside` has left where its process was killed."""
    return [file for folder in workspace.out.glob(f"{_ASIDE}*") for file in folder.glob()]


def _is_staged(place: Location) -> bool:
    try:
        metadata = read_schema(place).metadata or {}
    except (pyarrow.ArrowException, OSError):
        return False
    return bool(metadata.get(b"odedit") == b"staged")


def _records(config: RunConfig, sources: Sources, check: Check) -> Iterator[RawRecord]:
    return read_records(sources.path, task=config.data.task, limit=config.data.limit, check=check)


def _write(config: RunConfig, sources: Sources, path: Path, check: Check) -> None:
    needs_own = sources.pool is None and config.supervision.locality_source != "record" and reads_locality(config)
    rows: list[dict[str, Any]] = []
    num_rows = 0
    with parquet.ParquetWriter(path, STAGED_SCHEMA) as writer:
        for number, group in enumerate(_groups(_records(config, sources, check), config.pipeline.batch_size)):
            if needs_own:
                for record in group:
                    _check_locality(record)
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


def _check_locality(record: RawRecord) -> None:
    """Without a pool every record must bring its own unrelated questions: better said once, before the run."""
    if record.problem:
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


def _stage_pool(config: RunConfig, sources: Sources, place: Location, check: Check) -> None:
    assert sources.pool is not None
    seed = config.supervision.seed
    pool = Pool.sample(
        sources.pool, sources.pool_reader, size=POOL_RECORDS, seed=seed, task=config.data.task, check=check
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
    """Counts the records of every group; reads all columns but the records' fields."""
    usable: list[int] = []
    records: list[int] = []
    reasons = Reasons()
    with parquet_file(place) as file:
        for batch in file.iter_batches(columns=["group", "problem", "file", "index", "edit_id"]):
            for row in batch.to_pylist():
                group, problem = row["group"], row["problem"]
                for counts in (usable, records):
                    counts += [0] * (group + 1 - len(counts))
                usable[group] += not problem
                records[group] += 1
                if problem:
                    where = f"{row['file']}, record {row['index']}: "
                    reasons.add(row | {"status": "skipped", "error": f"{where}{problem}"})
    return Staged(tuple(usable), tuple(records), tuple(reasons.commonest()))


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
