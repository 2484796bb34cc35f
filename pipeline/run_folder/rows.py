"""Result rows, one per input record: their columns, and the Parquet files that hold them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
from pyarrow import compute

from odedit.data.records import RawRecord
from odedit.editors.common.weights import trained_with
from odedit.errors import InputError
from odedit.evaluation.statistics import MAIN, SHOWN
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, delete_all
from pipeline.config.run import RunConfig
from pipeline.run_folder.workspace import Workspace, parquet_file, read_schema, write_table

if TYPE_CHECKING:
    import pandas

EDITED, FAILED, SKIPPED = "edited", "failed", "skipped"
CURVES = pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.float64()))
ANSWERS = pyarrow.map_(pyarrow.string(), pyarrow.struct([("before", pyarrow.string()), ("after", pyarrow.string())]))
"""Generated answers by probe; runs of earlier versions lack the column."""
FIXED_COLUMNS: dict[str, pyarrow.DataType] = {
    "index": pyarrow.int64(),
    "edit_id": pyarrow.string(),
    "status": pyarrow.string(),
    "error": pyarrow.string(),
    "file": pyarrow.string(),
    "task": pyarrow.string(),
    "fact": pyarrow.string(),
    "prompt": pyarrow.string(),
    "target": pyarrow.string(),
    "editor": pyarrow.string(),
    "objective": pyarrow.string(),
    "backbone": pyarrow.string(),
    "supervision": pyarrow.string(),
    "trained_with": pyarrow.string(),
    "template": pyarrow.string(),
    **{metric: pyarrow.float64() for metric in MAIN},
    "steps": pyarrow.int64(),
    "stop_reason": pyarrow.string(),
    "seconds": pyarrow.float64(),
    "worst_nll": pyarrow.float64(),
    "lambda": pyarrow.float64(),
    "penalty_steps": pyarrow.int64(),
    "losses": CURVES,
    "answers": ANSWERS,
}
"""Columns of every result file, in order. Further measurements follow, sorted by name."""
KEPT = ("kept", "kept_text")
"""Columns of `kept.parquet`: whether the pool's questions are answered as before, with and without a picture."""
NOT_REPRODUCIBLE = ("seconds",)
"""Columns that differ when a run is repeated."""

PROGRESS_COLUMNS = ("edit_id", "status", "error", "seconds", *SHOWN)
"""Columns that a worker sends to the driver; the result file has all columns."""

GROUPS_PER_FILE = 256
"""Groups per result file of a finished run. Smaller runs keep one file per group."""
_MAPS = tuple(name for name, kind in FIXED_COLUMNS.items() if pyarrow.types.is_map(kind))
_ROWS_AT_ONCE = 512
_BYTES_AT_ONCE = 2**22

Row = dict[str, Any]


def base_row(record: RawRecord, config: RunConfig, status: str, error: str | None = None) -> Row:
    """Columns known before editing; also the whole row of a skipped or failed record."""
    fields = record.fields
    return {
        "index": record.index,
        "edit_id": record.edit_id,
        "status": status,
        "error": error,
        "file": masked(record.file),
        "task": record.task,
        "fact": _text(fields.get("fact")) or record.edit_id,
        "prompt": _text(fields.get("src")),
        "target": _text(fields.get("alt")),
        "editor": config.editor.name,
        "objective": config.objective.name,
        "backbone": config.backbone.name,
        "supervision": supervision_name(config),
        "trained_with": _trained_with(config),
        "template": config.data.template,
    }


def _trained_with(config: RunConfig) -> str | None:
    """Objective and supervision of the editor's own weights, which may differ from the run's."""
    path = getattr(config.editor.settings, "checkpoint", None)
    return None if path is None else trained_with(path)


def supervision_name(config: RunConfig) -> str:
    """Source of the supervision; both sources if rephrases and locality differ."""
    sources = (config.supervision.rephrase_source, config.supervision.locality_source)
    return sources[0] if sources[0] == sources[1] else f"rephrases {sources[0]}, locality {sources[1]}"


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    return value.encode("utf-8", errors="replace").decode()


def write_part(location: Location, rows: Sequence[Row]) -> None:
    """Writes the rows of one group, atomically."""
    write_table(location, to_table(rows))


def to_table(rows: Sequence[Row]) -> pyarrow.Table:
    """The rows as a table. Columns beyond the fixed ones are text if any row has text there, else numbers."""
    extra = sorted({name for row in rows for name in row} - FIXED_COLUMNS.keys())
    is_text = {name: any(isinstance(row.get(name), str) for row in rows) for name in extra}
    columns = FIXED_COLUMNS | {name: pyarrow.string() if is_text[name] else pyarrow.float64() for name in extra}
    plain = [{name: _plain(row.get(name)) for name in columns} for row in rows]
    return pyarrow.Table.from_pylist(plain, schema=pyarrow.schema(list(columns.items())))


def _plain(value: Any) -> Any:
    # Arrow's maps are lists of pairs; the order is fixed so that equal rows are equal bytes.
    return sorted(value.items()) if isinstance(value, Mapping) else value


def parts(workspace: Workspace) -> list[Location]:
    """The result files in the order of their groups, without files that are already gathered in a larger one."""
    spans = [(*groups_of(path), path) for path in workspace.results.glob("part-*.parquet")]
    kept: list[Location] = []
    end = 0
    for _, last, path in sorted(spans, key=lambda span: (span[0], -span[1])):
        if last >= end:
            kept.append(path)
            end = last + 1
    return kept


def groups_of(path: Location) -> tuple[int, int]:
    """The first and the last group in a result file: `part-000007.parquet`, `part-000256-000511.parquet`."""
    numbers = [int(number) for number in path.stem.removeprefix("part-").split("-")]
    return numbers[0], numbers[-1]


def digest(location: Location) -> str:
    """SHA-256 of a file, cut to the 32 characters that MLflow allows for a data set's digest."""
    with io.BufferedReader(location.open(), _BYTES_AT_ONCE) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def finished_groups(workspace: Workspace) -> set[int]:
    """Groups whose rows are written."""
    spans = map(groups_of, parts(workspace))
    return {group for first, last in spans for group in range(first, last + 1)}


def read_rows(
    files: Iterable[Location],
    columns: Sequence[str] | None = None,
    statuses: Sequence[str] | None = None,
    edit_ids: Collection[str] | None = None,
    without: Collection[str] = (),
) -> Iterator[Row]:
    """Rows of result files, in order.

    Args:
        columns: Names to read; those that a file lacks are left out. All columns by default.
        statuses: Statuses to keep, which need the column `status`. All rows by default.
        edit_ids: Edit ids to keep, which need the column `edit_id`. All rows by default.
        without: Names not to read.
    """
    kept = [
        (column, pyarrow.array(sorted(values), pyarrow.string()))
        for column, values in (("status", statuses), ("edit_id", edit_ids))
        if values is not None
    ]
    for location in files:
        with parquet_file(location) as file:
            names = file.schema_arrow.names
            present = [name for name in columns or names if name in names and name not in without]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=present):
                for column, values in kept:
                    batch = batch.filter(compute.is_in(batch.column(column), values))
                for row in batch.to_pylist():
                    for name in _MAPS:
                        if row.get(name) is not None:
                            row[name] = dict(row[name])
                    yield row


def unify(workspace: Workspace) -> None:
    """Gathers the rows of a finished run in files of 256 groups, and gives all files the same columns.

    Records may have different further probes, and libraries that read several files use the columns of the first. A run
    of at most 256 groups keeps a file per group.
    """
    paths = parts(workspace)
    if paths and groups_of(paths[-1])[1] >= GROUPS_PER_FILE:
        for _, members in groupby(paths, lambda path: groups_of(path)[0] // GROUPS_PER_FILE):
            _merge(workspace, list(members))
        paths = parts(workspace)
    _drop_repeated(workspace, paths)
    schemas = [read_schema(path).remove_metadata() for path in paths]
    if len({str(schema) for schema in schemas}) < 2:
        return
    unified = _unified(schemas)
    for path, schema in zip(paths, schemas, strict=True):
        if schema != unified:
            write_table(path, _with_schema(read_table(path), unified))


def read_table(location: Location, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """The given columns of a Parquet file, or all."""
    with parquet_file(location) as file:
        return file.read(columns)


def read_kept(workspace: Workspace) -> list[Row]:
    """Rows of `kept.parquet`, with shares in place of truth values; empty if nothing of the kind was measured."""
    rows = read_table(workspace.kept).to_pylist() if workspace.kept.exists() else []
    return [row | {name: float(row[name]) for name in KEPT if row[name] is not None} for row in rows]


def to_pandas(workspace: Workspace, columns: Sequence[str] | None = None) -> pandas.DataFrame:
    """All rows of a run as a data frame, maps as dictionaries.

    Args:
        columns: Columns to read; None: all.

    Raises:
        InputError: No file has a column of that name.
    """
    paths = parts(workspace)
    schema = _unified(read_schema(path).remove_metadata() for path in paths)
    for name in columns or ():
        if name not in schema.names:
            raise InputError(f"columns: the run has no column {name!r}; it has {', '.join(schema.names)}.")
    tables = (_with_schema(read_table(path), schema) for path in paths)
    table = pyarrow.concat_tables([schema.empty_table(), *tables])
    return table.select(columns or schema.names).to_pandas(maps_as_pydicts="strict")


def _merge(workspace: Workspace, paths: Sequence[Location]) -> None:
    """Writes the rows of several files to one file. `parts` ignores old files that a kill left undeleted."""
    if len(paths) < 2:
        return
    target = workspace.results / f"part-{groups_of(paths[0])[0]:06d}-{groups_of(paths[-1])[1]:06d}.parquet"
    tables = [read_table(path) for path in paths]
    schema = _unified(table.schema.remove_metadata() for table in tables)
    write_table(target, pyarrow.concat_tables(_with_schema(table, schema) for table in tables))


def _drop_repeated(workspace: Workspace, kept: Sequence[Location]) -> None:
    """Deletes the files that are already gathered in a larger one."""
    names = {path.name for path in kept}
    delete_all([path for path in workspace.results.glob("part-*.parquet") if path.name not in names])


def drop_groups(workspace: Workspace, path: Location, group_of_row: np.ndarray, groups: set[int]) -> None:
    """Deletes the rows of some groups from a file; the file's other groups get a file each.

    Args:
        group_of_row: Group of every row of the file, ascending, [rows].
        groups: Groups to delete.
    """
    table = read_table(path)
    for group in sorted(set(group_of_row.tolist()) - groups):
        first, end = np.searchsorted(group_of_row, (group, group + 1))
        write_table(workspace.part(group), table.slice(first, end - first))
    path.delete()


def _unified(schemas: Iterable[pyarrow.Schema]) -> pyarrow.Schema:
    fields = [field for schema in schemas for field in schema]
    # Files of an earlier version lack the columns that were added since.
    types = FIXED_COLUMNS | {field.name: field.type for field in fields}
    # A column without text in one file was written as numbers there.
    types |= {field.name: field.type for field in fields if field.type == pyarrow.string()}
    extra = sorted(types.keys() - FIXED_COLUMNS.keys())
    return pyarrow.schema([(name, types[name]) for name in (*FIXED_COLUMNS, *extra)])


def _with_schema(table: pyarrow.Table, schema: pyarrow.Schema) -> pyarrow.Table:
    """The table in the given columns; columns that it lacks are null."""
    return pyarrow.concat_tables(
        [schema.empty_table(), table.replace_schema_metadata(None)], promote_options="permissive"
    )


def to_json_row(row: Row) -> str:
    """JSON of a row without `NOT_REPRODUCIBLE`, equal for the rows of repeated runs."""
    return json.dumps({name: value for name, value in row.items() if name not in NOT_REPRODUCIBLE}, sort_keys=True)
