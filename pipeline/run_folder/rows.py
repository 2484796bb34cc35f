"""Result rows: one per input record, written once, in Parquet files that any tool reads as one table."""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute

from odedit.data.records import RawRecord
from odedit.editors.common.weights import trained_with
from odedit.evaluation.statistics import MAIN, Estimate, estimate_column
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, delete_all
from pipeline.config.run import RunConfig
from pipeline.run_folder.reasons import Reasons
from pipeline.run_folder.workspace import Workspace, parquet_file, read_schema, write_table

EDITED, FAILED, SKIPPED = "edited", "failed", "skipped"
CURVES = pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.float64()))
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
}
"""Columns of every result file; what is measured beyond them follows, sorted by name."""
NOT_REPRODUCIBLE = ("seconds",)
"""The only column that differs when a run is repeated."""

PROGRESS_COLUMNS = ("edit_id", "status", "error", "seconds", *MAIN)
"""What a worker reports of each row; the rest is in its file."""

GROUPS_PER_FILE = 256
"""Larger runs gather the rows of so many groups in one file once they are finished."""
_ROWS_AT_ONCE = 512
_BYTES_AT_ONCE = 2**22
_VALUES_AT_ONCE = 2**19

Row = dict[str, Any]


def base_row(record: RawRecord, config: RunConfig, status: str, error: str | None = None) -> Row:
    """What is known of a record before it is edited; also the whole row of one that is not."""
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
        "backbone": f"{config.backbone.family}:{config.backbone.checkpoint}",
        "supervision": supervision_name(config),
        "trained_with": _trained_with(config),
        "template": config.data.template,
    }


def _trained_with(config: RunConfig) -> str | None:
    """What the editor's own weights learned with: it need not be what the run is called after."""
    path = getattr(config.editor.settings, "checkpoint", None)
    return None if path is None else trained_with(path)


def supervision_name(config: RunConfig) -> str:
    """Where supervision came from, in a word for rephrases and one for locality."""
    sources = (config.supervision.rephrase_source, config.supervision.locality_source)
    return sources[0] if sources[0] == sources[1] else f"rephrases {sources[0]}, locality {sources[1]}"


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    return value.encode("utf-8", errors="replace").decode()


def write_part(place: Location, rows: Sequence[Row]) -> None:
    """Writes the rows of one group, all or nothing."""
    write_table(place, to_table(rows))


def to_table(rows: Sequence[Row]) -> pyarrow.Table:
    extra = sorted({name for row in rows for name in row} - FIXED_COLUMNS.keys())
    is_text = {name: any(isinstance(row.get(name), str) for row in rows) for name in extra}
    columns = FIXED_COLUMNS | {name: pyarrow.string() if is_text[name] else pyarrow.float64() for name in extra}
    plain = [{name: _plain(row.get(name)) for name in columns} for row in rows]
    return pyarrow.Table.from_pylist(plain, schema=pyarrow.schema(list(columns.items())))


def _plain(value: Any) -> Any:
    # Arrow's maps are lists of pairs; the order is fixed so that equal rows are equal bytes.
    return sorted(value.items()) if isinstance(value, Mapping) else value


def parts(workspace: Workspace) -> list[Location]:
    """The result files in the order of their groups; those whose rows are in a larger one too are left out."""
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


def digest(place: Location) -> str:
    """Names the content of a file, in MLflow's length for data sets."""
    with io.BufferedReader(place.open(), _BYTES_AT_ONCE) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def finished_groups(workspace: Workspace) -> set[int]:
    spans = map(groups_of, parts(workspace))
    return {group for first, last in spans for group in range(first, last + 1)}


def read_rows(
    places: Iterable[Location], columns: Sequence[str] | None = None, statuses: Sequence[str] | None = None
) -> Iterator[Row]:
    """Rows of result files, in order, a file at a time; those of the given statuses, or all."""
    for place in places:
        with parquet_file(place) as file:
            wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                if statuses is not None:
                    batch = batch.filter(compute.is_in(batch.column("status"), pyarrow.array(statuses)))
                for row in batch.to_pylist():
                    if row.get("losses") is not None:
                        row["losses"] = dict(row["losses"])
                    yield row


def unify(workspace: Workspace) -> None:
    """Puts the rows of many groups into one file each time, and gives all files the same columns.

    Records differ in their further probes, and readers go by the first file. A few groups stay as they are.
    """
    paths = parts(workspace)
    if paths and groups_of(paths[-1])[1] >= GROUPS_PER_FILE:
        together: dict[int, list[Location]] = {}
        for path in paths:
            together.setdefault(groups_of(path)[0] // GROUPS_PER_FILE, []).append(path)
        for some in together.values():
            _merge(workspace, some)
        paths = parts(workspace)
    _drop_repeated(workspace, paths)
    schemas = [read_schema(path).remove_metadata() for path in paths]
    if len({str(schema) for schema in schemas}) < 2:
        return
    unified = _unified(schemas)
    for path, schema in zip(paths, schemas, strict=True):
        if schema != unified:
            write_table(path, _with_schema(_read_table(path), unified))


def _read_table(place: Location, columns: Sequence[str] | None = None) -> pyarrow.Table:
    with parquet_file(place) as file:
        return file.read(columns)


def _merge(workspace: Workspace, paths: Sequence[Location]) -> None:
    """Writes one file in the place of several. A kill before they are deleted leaves both: `parts` sees the larger."""
    if len(paths) < 2:
        return
    target = workspace.results / f"part-{groups_of(paths[0])[0]:06d}-{groups_of(paths[-1])[1]:06d}.parquet"
    tables = [_read_table(path) for path in paths]
    schema = _unified(table.schema.remove_metadata() for table in tables)
    write_table(target, pyarrow.concat_tables(_with_schema(table, schema) for table in tables))


def _drop_repeated(workspace: Workspace, kept: Sequence[Location]) -> None:
    """Deletes the files whose rows are in a larger one."""
    names = {path.name for path in kept}
    delete_all([path for path in workspace.results.glob("part-*.parquet") if path.name not in names])


def take_out(workspace: Workspace, path: Location, numbers: np.ndarray, groups: set[int]) -> None:
    """Deletes the rows of some groups; those of the others in the same file get files of their own.

    Args:
        numbers: Group of every row.
    """
    table = _read_table(path)
    for group in sorted(set(numbers.tolist()) - groups):
        first, end = np.searchsorted(numbers, (group, group + 1))
        write_table(workspace.part(group), table.slice(first, end - first))
    path.delete()


def _unified(schemas: Iterable[pyarrow.Schema]) -> pyarrow.Schema:
    fields = [field for schema in schemas for field in schema]
    types = {field.name: field.type for field in fields}
    # Text wins: a column without any text in one file was taken for numbers.
    types |= {field.name: field.type for field in fields if field.type == pyarrow.string()}
    extra = sorted(types.keys() - FIXED_COLUMNS.keys())
    return pyarrow.schema([(name, types[name]) for name in (*FIXED_COLUMNS, *extra)])


def _with_schema(table: pyarrow.Table, schema: pyarrow.Schema) -> pyarrow.Table:
    """The table with nulls where it has no such column."""
    return pyarrow.concat_tables(
        [schema.empty_table(), table.replace_schema_metadata(None)], promote_options="permissive"
    )


def summarize_results(workspace: Workspace, config: RunConfig) -> dict[str, Any]:
    """Counts, why records were not edited, and every figure's mean and 95% interval over the edits that worked."""
    paths = parts(workspace)
    counts = dict.fromkeys((EDITED, FAILED, SKIPPED), 0)
    stop_reasons: Counter[str] = Counter()
    reasons = Reasons()
    facts = array("Q")
    for row in read_rows(paths, ("status", "error", "file", "index", "stop_reason", "fact", "edit_id")):
        counts[row["status"]] += 1
        if row["status"] == EDITED:
            stop_reasons[row["stop_reason"] or "unknown"] += 1
            facts.append(_number(row.get("fact") or row["edit_id"]))
        else:
            reasons.add(row)
    estimates = _estimates(paths, np.unique(facts, return_inverse=True)[1])
    names = [*MAIN, *sorted(estimates.keys() - set(MAIN))]
    return {
        "n": counts[EDITED],
        "failed": counts[FAILED],
        "skipped": counts[SKIPPED],
        "editor": config.editor.name,
        "objective": config.objective.name,
        "backbone": f"{config.backbone.family}:{config.backbone.checkpoint}",
        "supervision": supervision_name(config),
        "stop_reasons": dict(stop_reasons.most_common()),
        "reasons": reasons.commonest(),
        "metrics": {
            name: {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n}
            for name in names
            if (e := estimates.get(name)) is not None
        },
    }


def _number(text: str) -> int:
    """Stands for a fact in eight bytes: there may be as many as records."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _estimates(paths: Sequence[Location], facts: np.ndarray) -> dict[str, Estimate]:
    """Every figure's mean and interval over the edited rows; some columns at a time, so that memory stays small."""
    names = [field.name for field in read_schema(paths[0]) if _is_figure(field)] if len(facts) else []
    at_once = max(1, _VALUES_AT_ONCE // max(1, len(facts)))
    found: dict[str, Estimate] = {}
    # The files are read anew for each part of the columns: a small run's all at once.
    for start in range(0, len(names), at_once):
        columns = {name: array("d") for name in names[start : start + at_once]}
        for path in paths:
            table = _read_table(path, ["status", *columns])
            table = table.filter(compute.equal(table.column("status"), EDITED))
            for name, values in columns.items():
                values.frombytes(table.column(name).cast(pyarrow.float64()).to_numpy().tobytes())
        for name, values in columns.items():
            column = np.frombuffer(values)
            finite = np.isfinite(column)
            if finite.any():
                found[name] = estimate_column(column[finite].tolist(), facts[finite].tolist())
    return found


def _is_figure(field: pyarrow.Field) -> bool:
    return field.name != "index" and (pyarrow.types.is_floating(field.type) or pyarrow.types.is_integer(field.type))


def to_json_row(row: Row) -> str:
    """A row as text that equal rows share; without the columns that differ between repeats."""
    return json.dumps({name: value for name, value in row.items() if name not in NOT_REPRODUCIBLE}, sort_keys=True)
