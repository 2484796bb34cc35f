"""Result rows: one per input record, written once, in Parquet files that any tool reads as one table."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.editor_weights import trained_with
from odedit.locations import masked
from odedit.metrics import MAIN, summarize
from odedit.mmedit import RawRecord
from pipeline.config import RunConfig
from pipeline.workspace import Workspace, write_atomically

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


def write_part(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows of one group, all or nothing."""
    table = to_table(rows)
    write_atomically(path, lambda temporary: parquet.write_table(table, temporary))


def to_table(rows: Sequence[Row]) -> pyarrow.Table:
    extra = sorted({name for row in rows for name in row} - FIXED_COLUMNS.keys())
    is_text = {name: any(isinstance(row.get(name), str) for row in rows) for name in extra}
    columns = FIXED_COLUMNS | {name: pyarrow.string() if is_text[name] else pyarrow.float64() for name in extra}
    plain = [{name: _plain(row.get(name)) for name in columns} for row in rows]
    return pyarrow.Table.from_pylist(plain, schema=pyarrow.schema(list(columns.items())))


def _plain(value: Any) -> Any:
    # Arrow's maps are lists of pairs; the order is fixed so that equal rows are equal bytes.
    return sorted(value.items()) if isinstance(value, Mapping) else value


def parts(workspace: Workspace) -> list[Path]:
    return sorted(workspace.results.glob("part-*.parquet"))


def digest(path: Path) -> str:
    """Names the content of a file, in MLflow's length for data sets."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def finished_groups(workspace: Workspace) -> set[int]:
    return {int(path.stem.removeprefix("part-")) for path in parts(workspace)}


def read_rows(paths: Iterable[Path], columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of result files, in order, a file at a time."""
    for path in paths:
        file = parquet.ParquetFile(path)
        wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        for row in file.read(columns=wanted).to_pylist():
            if row.get("losses") is not None:
                row["losses"] = dict(row["losses"])
            yield row


def unify(workspace: Workspace) -> None:
    """Gives all result files the same columns: records differ in their further probes, readers go by the first file."""
    paths = parts(workspace)
    schemas = {path: parquet.read_schema(path).remove_metadata() for path in paths}
    if len({str(schema) for schema in schemas.values()}) < 2:
        return
    types = {field.name: field.type for schema in schemas.values() for field in schema}
    for schema in schemas.values():  # text wins: a column without any text in one file was taken for numbers
        types |= {field.name: field.type for field in schema if field.type == pyarrow.string()}
    extra = sorted(types.keys() - FIXED_COLUMNS.keys())
    unified = pyarrow.schema([(name, types[name]) for name in (*FIXED_COLUMNS, *extra)])
    for path, schema in schemas.items():
        if schema != unified:
            table = pyarrow.concat_tables(
                [unified.empty_table(), parquet.read_table(path)], promote_options="permissive"
            )
            write_atomically(path, lambda temporary, table=table: parquet.write_table(table, temporary))  # type: ignore[misc]


def summarize_results(workspace: Workspace, config: RunConfig) -> dict[str, Any]:
    """Counts, and every figure's mean and 95% confidence interval over the edits that worked."""
    counts = dict.fromkeys((EDITED, FAILED, SKIPPED), 0)
    reasons: Counter[str] = Counter()
    numbers: list[dict[str, float]] = []
    facts: list[str] = []
    for row in read_rows(parts(workspace)):
        counts[row["status"]] += 1
        if row["status"] == EDITED:
            reasons[row["stop_reason"] or "unknown"] += 1
            facts.append(row.get("fact") or row["edit_id"])
            numbers.append({name: value for name, value in row.items() if _is_figure(name, value)})
    estimates = summarize(numbers, facts)
    names = [*MAIN, *sorted(estimates.keys() - set(MAIN))]
    return {
        "n": counts[EDITED],
        "failed": counts[FAILED],
        "skipped": counts[SKIPPED],
        "editor": config.editor.name,
        "objective": config.objective.name,
        "backbone": f"{config.backbone.family}:{config.backbone.checkpoint}",
        "supervision": supervision_name(config),
        "stop_reasons": dict(reasons.most_common()),
        "metrics": {
            name: {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n}
            for name in names
            if (e := estimates.get(name)) is not None
        },
    }


def _is_figure(name: str, value: Any) -> bool:
    return name != "index" and isinstance(value, (int, float)) and math.isfinite(value)


def to_json_row(row: Row) -> str:
    """A row as text that equal rows share; without the columns that differ between repeats."""
    return json.dumps({name: value for name, value in row.items() if name not in NOT_REPRODUCIBLE}, sort_keys=True)
