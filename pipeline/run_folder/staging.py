"""Divides the input into groups of edits, once, before any worker starts.

A group is the unit of scheduling, retry and output. Its members depend only on the input and on `batch_size`, so
workers, crashes and resumed runs change no result. It also holds the unusable records between its members, so that the
results have one row per input record. `records.parquet` has the column `group`; its row groups hold many groups each,
because a reader keeps the metadata of every row group in memory.
"""

from __future__ import annotations

import random
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from odedit import editors, ways
from odedit.backbones import load_processor
from odedit.data import made
from odedit.data.fields import control_token_problem
from odedit.data.ids import Digests
from odedit.data.origins import NEGATIVES, Wanted
from odedit.data.origins import counted as counted_origins
from odedit.data.packed import RECORDS_SCHEMA
from odedit.data.pool import Pool
from odedit.data.records import Check, RawRecord, read_records
from odedit.data.supervision import check_pool, lacks_locality
from odedit.errors import InputError
from odedit.inputs.batch import LOCALITY_SLOTS
from odedit.inputs.markers import control_token_finder
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, locate
from pipeline.config.run import RunConfig
from pipeline.run_folder.pictures import check_pictures, has_embedded_pictures
from pipeline.run_folder.reasons import Reasons
from pipeline.run_folder.sources import Sources
from pipeline.run_folder.workspace import Workspace, parquet_file, read_schema, write_table

POOL_RECORDS = 256
PICTURES, OWN_PICTURES = "data.pictures", "the records' pictures"
"""Sources of a pool that is made of pictures."""
STAGED_SCHEMA = RECORDS_SCHEMA.append(pyarrow.field("group", pyarrow.int64())).with_metadata({"odedit": "staged"})
"""Schema with metadata that distinguishes staged files from a user's Parquet files of the same name."""
CheckStaged = Callable[[Workspace, Sources], None]
"""Function that raises InputError if staged records are wrong for the command."""
_PROBLEMS_PER_GROUP = 2000
_ASIDE = ".staging-"
_ROWS_TOGETHER = 512


@dataclass(frozen=True)
class Staged:
    """Counts of the staged input.

    Attributes:
        usable: Number of usable records per group.
        records: Number of records per group, unusable ones included.
        reasons: Commonest reasons of unusable records, from `Reasons.commonest`.
    """

    usable: tuple[int, ...]
    records: tuple[int, ...]
    reasons: tuple[dict[str, Any], ...] = field(default=(), compare=False)

    @property
    def num_usable(self) -> int:
        return sum(self.usable)

    @property
    def problems(self) -> int:
        """Number of unusable records."""
        return sum(self.records) - self.num_usable

    def size(self, group: int) -> int:
        """Number of records in a group; 0 if there is no such group."""
        return self.records[group] if group < len(self.records) else 0


def stage(config: RunConfig, sources: Sources, workspace: Workspace) -> Staged:
    """Writes `records.parquet` and `pool.parquet` unless they exist.

    Without `data.pool`, a pool is made of pictures where the run reads supervision that a record does not give.

    Raises:
        InputError: The input cannot be read, or none of its pictures exists; or no record of the pool can supervise a
            record of the run.
    """
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

            def write(path: Path) -> None:
                paths = _write(config, sources, path, check)
                if paths is not None and not _is_staged(workspace.pool):
                    _stage_pictures(config, sources, workspace.pool, paths)  # before the records, which are the last

            workspace.records.write_with(write)
    return read_staged(workspace.records)


def check_for(tokenizer: Any) -> Check:
    """The check that a record's texts contain no special token of the tokenizer."""
    return partial(control_token_problem, find=control_token_finder(tokenizer))


def reads_locality(config: RunConfig) -> bool:
    """Whether the edits read locality supervision; otherwise the run needs no pool."""
    editor = editors.find(config.editor.name)(config.editor.settings)
    return not config.objective.settings.reads(editor).isdisjoint(LOCALITY_SLOTS)


def wanted(config: RunConfig, workspace: Workspace, sources: Sources) -> Wanted:
    """The supervision that the edits of a staged run read, and the pool that it is from."""
    editor = editors.find(config.editor.name)(config.editor.settings)
    settings = config.objective.settings
    slots = settings.reads(editor) | ({NEGATIVES} if settings.num_negatives else set())
    if not workspace.pool.exists():
        return Wanted(slots)
    with parquet_file(workspace.pool) as file:
        count = file.metadata.num_rows
    return Wanted(slots, pool_source(workspace, sources), sources.pool is None, count)


def pool_source(workspace: Workspace, sources: Sources) -> str:
    """What a staged pool is made of: `data.pool`, `PICTURES` or `OWN_PICTURES`."""
    if sources.pool is not None:
        return "data.pool"
    with parquet_file(workspace.pool) as file:
        return str(file.read(["file"]).column("file")[0].as_py())


def origins(config: RunConfig, workspace: Workspace, sources: Sources) -> dict[str, Counter[str]]:
    """Number of staged records by name of the supervision that they read and by its origin."""
    reads = wanted(config, workspace, sources)
    return counted_origins(usable_records(workspace.records), config.supervision, reads)


def _check_supervision(config: RunConfig, sources: Sources, pool: Pool | None, check: Check) -> None:
    """Raises one InputError, instead of skipping every record, if the pool can supervise none of them."""
    if pool is None or not reads_locality(config):
        return
    usable = (record for record in _records(config, sources, check) if not record.problem)
    check_pool(usable, sources.reader, config.supervision, pool)


@contextmanager
def staged_aside(
    config: RunConfig, sources: Sources, workspace: Workspace, check_staged: CheckStaged | None = None
) -> Iterator[Staged]:
    """Stages in a temporary folder, and moves the files to the workspace after the block.

    If the input is wrong or the block fails, the workspace is unchanged.

    Args:
        check_staged: Further check of the staged records, before the block.

    Raises:
        InputError: See `stage`; raised before the block is entered.
    """
    beside = workspace.out if workspace.out.is_local else None
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=beside) as folder:
        temporary = Workspace(locate(folder, "out"))
        staged = stage(config, sources, temporary)
        if check_staged is not None:
            check_staged(temporary, sources)
        yield staged
        for new, target in ((temporary.pool, workspace.pool), (temporary.records, workspace.records)):
            if new.exists():
                target.take(Path(new))


def leftovers(workspace: Workspace) -> list[Location]:
    """Staged files of a run that failed before its first result; outdated if the input has changed since.

    Raises:
        InputError: A file with the name of a staged one was not written by a run.
    """
    staged = [path for path in (workspace.records, workspace.pool) if path.exists()]
    for path in staged:
        if not _is_staged(path):
            raise InputError(
                f"out: {path} was not written by a run and would be replaced. Choose another folder (out=...)."
            )
    return [*staged, *([workspace.calibration] if workspace.calibration.exists() else [])]


def abandoned(workspace: Workspace) -> list[Location]:
    """Temporary files of `staged_aside` whose process was killed."""
    return [file for folder in workspace.out.glob(f"{_ASIDE}*") for file in folder.glob()]


def _is_staged(location: Location) -> bool:
    try:
        metadata = read_schema(location).metadata or {}
    except (pyarrow.ArrowException, OSError):
        return False
    return bool(metadata.get(b"odedit") == b"staged")


def _records(config: RunConfig, sources: Sources, check: Check) -> Iterator[RawRecord]:
    """The records of the run's file, and of the further files of `commit.add`, numbered on."""
    read = partial(read_records, task=config.data.task, check=check, columns=sources.columns)
    records = read(sources.path, limit=config.data.limit)
    added = sources.added if config.commit is None else config.commit.settings.add
    if not added:
        yield from records
        return
    seen = Digests()
    count = 0
    for path in (None, *added):
        first = count
        for record in records if path is None else _added(path, read(path)):
            count = max(count, first + record.index + 1)
            problem = record.problem
            if not seen.add(record.edit_id) and not problem:
                problem = f"repeated edit id: {record.edit_id!r} is that of a record in another file"
            yield replace(record, index=first + record.index, problem=problem)


def _added(path: str, records: Iterator[RawRecord]) -> Iterator[RawRecord]:
    """The records of a file of `commit.add`. Raises InputError for pictures that are no files."""
    for record in records:
        if not record.problem and has_embedded_pictures(record):
            raise InputError(
                f"commit.add: {masked(path)}, record {record.index}: its pictures lie in the packed folder or table, "
                "where those of added records are not looked for. Give a file of records whose pictures are files."
            )
        yield record


def _write(config: RunConfig, sources: Sources, path: Path, check: Check) -> list[str] | None:
    """Writes `records.parquet`.

    Returns:
        Paths of up to 256 pictures that the records edit, drawn uniformly, if the run needs a pool of pictures; None if
        it does not.
    """
    measures = config.commit is not None and ways.find(config.commit.name).measures
    needs_pictures = sources.pool is None and bool(
        config.objective.settings.num_negatives or sources.pictures or measures
    )
    needs_locality = sources.pool is None and reads_locality(config)
    pictures = _Sample(POOL_RECORDS, config.supervision.seed)
    rows: list[dict[str, Any]] = []
    num_rows = 0
    with parquet.ParquetWriter(path, STAGED_SCHEMA) as writer:
        for number, group in enumerate(_groups(_records(config, sources, check), config.pipeline.batch_size)):
            for record in group if sources.pool is None else ():
                if not record.problem:
                    pictures.add(record.fields["image"])
                    needs_pictures |= needs_locality and lacks_locality(record, config.supervision)
            rows += (record.to_row() | {"group": number} for record in group)
            num_rows += len(group)
            if len(rows) >= _ROWS_TOGETHER:
                _write_rows(writer, rows)
                rows = []
        _write_rows(writer, rows)
    if not num_rows:
        raise InputError(f"data.path: {masked(config.data.path)} holds no record.")
    return list(dict.fromkeys(pictures.chosen)) if needs_pictures else None


class _Sample:
    """Uniform sample of a stream (reservoir sampling).

    Attributes:
        chosen: The values drawn so far.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._rng, self._count = size, random.Random(seed), 0
        self.chosen: list[str] = []

    def add(self, value: str) -> None:
        """Adds the next value of the stream."""
        self._count += 1
        if len(self.chosen) < self._size:
            self.chosen.append(value)
        elif (index := self._rng.randrange(self._count)) < self._size:
            self.chosen[index] = value


def _write_rows(writer: parquet.ParquetWriter, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        table = pyarrow.Table.from_pylist(rows, schema=STAGED_SCHEMA)
        writer.write_table(table, row_group_size=len(rows))


def _groups(records: Iterator[RawRecord], batch_size: int) -> Iterator[list[RawRecord]]:
    """Splits the records after every `batch_size` usable or 2000 unusable ones."""
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


def _stage_pool(config: RunConfig, sources: Sources, location: Location, check: Check) -> None:
    """Writes `pool.parquet`, a random sample of the pool."""
    assert sources.pool is not None
    pool = Pool.sample(
        sources.pool,
        sources.pool_reader,
        size=POOL_RECORDS,
        seed=config.supervision.seed,
        task=config.data.task,
        check=check,
        columns=sources.columns,
    )
    _write_pool(pool.records, location)


def _stage_pictures(config: RunConfig, sources: Sources, location: Location, own: Sequence[str]) -> None:
    """Writes `pool.parquet`: general questions about the pictures of `data.pictures`, or about the records' own."""
    seed = config.supervision.seed
    paths: Sequence[str] = own
    if sources.pictures is not None:
        paths = made.pictures_in(locate(sources.pictures, "data.pictures"), POOL_RECORDS, seed)
    source = PICTURES if sources.pictures is not None else OWN_PICTURES
    _write_pool(made.about_pictures(paths, source, seed), location)


def _write_pool(records: Sequence[RawRecord], location: Location) -> None:
    rows = [record.to_row() | {"group": 0} for record in records]
    write_table(location, pyarrow.Table.from_pylist(rows, schema=STAGED_SCHEMA))


def read_pool(workspace: Workspace, sources: Sources) -> Pool | None:
    """The staged pool, or None if the run has none."""
    if not workspace.pool.exists():
        return None
    with parquet_file(workspace.pool) as file:
        rows = file.read().to_pylist()
    records = tuple(RawRecord.from_row(row) for row in rows)
    return Pool(
        records,
        sources.pool_reader,
        is_made=sources.pool is None,
        is_own=sources.pool is None and sources.pictures is None,
    )


def read_staged(location: Location) -> Staged:
    """Counts the records of `records.parquet`, without reading their fields."""
    usable: list[int] = []
    records: list[int] = []
    reasons = Reasons()
    with parquet_file(location) as file:
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
    """Reader of single groups. It caches the last row group, so read groups in about ascending order.

    Args:
        location: `records.parquet`, opened on the first read.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._last_groups: list[int] = []
        self._cached: tuple[int, pyarrow.Table] | None = None

    def __call__(self, group: int) -> list[RawRecord]:
        """The records of a group, unusable ones included, in the order of the input."""
        table = self._row_group(group)
        first, end = np.searchsorted(table.column("group").to_numpy(), (group, group + 1))
        return [RawRecord.from_row(row) for row in table.slice(first, end - first).to_pylist()]

    def _row_group(self, group: int) -> pyarrow.Table:
        if not self._last_groups:
            with parquet_file(self._location) as file:
                metadata = file.metadata
            column = metadata.schema.names.index("group")
            self._last_groups = [
                metadata.row_group(index).column(column).statistics.max for index in range(metadata.num_row_groups)
            ]
        index = bisect_left(self._last_groups, group)
        if self._cached is None or self._cached[0] != index:
            with parquet_file(self._location) as file:
                self._cached = index, file.read_row_group(index)
        return self._cached[1]


def usable_records(location: Location) -> Iterator[RawRecord]:
    """The usable records, in the order of the input."""
    with parquet_file(location) as file:
        for batch in file.iter_batches(batch_size=_ROWS_TOGETHER):
            yield from (RawRecord.from_row(row) for row in batch.to_pylist() if not row["problem"])
