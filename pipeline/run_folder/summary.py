"""Summary of a run's result rows, written to `summary.json`."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute

from odedit.errors import InputError
from odedit.evaluation.score import SCORE, score_of_means
from odedit.evaluation.statistics import SHOWN, Estimate, estimate_column
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, LocationLike, at
from pipeline.config.run import RunConfig
from pipeline.run_folder.reasons import Reasons
from pipeline.run_folder.rows import EDITED, FAILED, KEPT, SKIPPED, parts, read_rows, read_table, supervision_name
from pipeline.run_folder.workspace import Workspace, read_json, read_schema

_VALUES_AT_ONCE = 2**19


def summarize_results(workspace: Workspace, config: RunConfig) -> dict[str, Any]:
    """Counts by status, commonest reasons, and the mean and 95% interval of every number over the edited records."""
    paths = parts(workspace)
    counts = dict.fromkeys((EDITED, FAILED, SKIPPED), 0)
    stop_reasons: Counter[str] = Counter()
    reasons = Reasons()
    facts = array("Q")
    for row in read_rows(paths, ("status", "error", "file", "index", "stop_reason", "fact", "edit_id")):
        counts[row["status"]] += 1
        if row["status"] == EDITED:
            stop_reasons[row["stop_reason"] or "unknown"] += 1
            facts.append(_hash(row.get("fact") or row["edit_id"]))
        else:
            reasons.add(row)
    estimates = _estimates(paths, np.unique(facts, return_inverse=True)[1])
    names = [*SHOWN, *sorted(estimates.keys() - set(SHOWN))]
    metrics = {name: asdict(estimates[name]) for name in names if name in estimates}
    total = score_of_means(metrics, counts[FAILED])
    return {
        "n": counts[EDITED],
        "failed": counts[FAILED],
        "skipped": counts[SKIPPED],
        SCORE: total if math.isfinite(total) else None,
        "editor": config.editor.name,
        "objective": config.objective.name,
        "backbone": config.backbone.name,
        "supervision": supervision_name(config),
        "stop_reasons": dict(stop_reasons.most_common()),
        "reasons": reasons.commonest(),
        "metrics": metrics,
    }


def summarize_kept(workspace: Workspace) -> dict[str, Any]:
    """Means of `kept` and `kept_text` with intervals clustered by fact, and the figures of the text, if measured."""
    summary: dict[str, Any] = {}
    if workspace.kept.exists():
        columns = read_table(workspace.kept).to_pydict()
        for name in KEPT:
            known = [index for index, value in enumerate(columns[name]) if value is not None]
            if known:
                values, facts = ([columns[key][index] for index in known] for key in (name, "fact"))
                summary[name] = asdict(estimate_column([float(value) for value in values], facts))
    if (text := read_json(workspace.text)) is not None:
        summary["text"] = text
    return summary


def finished_run(folder: LocationLike, setting: str) -> tuple[Workspace, dict[str, Any]]:
    """Folder and summary of a finished run.

    Args:
        folder: Path or address.
        setting: Name of the argument, for the message.

    Raises:
        InputError: There is no run, or it is not finished.
    """
    workspace = Workspace(at(folder, setting))
    summary = read_json(workspace.summary)
    if summary is None:
        state = "its run is not finished" if workspace.run.exists() else "there is no run"
        raise InputError(
            f"{setting} {masked(str(folder))!r}: {state}; expected the folder (out) of a finished run, which has a "
            "summary.json."
        )
    return workspace, summary


def _hash(text: str) -> int:
    """Hash of a fact in 8 bytes, to keep a million facts small."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _estimates(paths: Sequence[Location], facts: np.ndarray) -> dict[str, Estimate]:
    """Mean and interval of every numeric column over the edited rows.

    Reads the files once per block of columns, so that memory stays at a few MB for any length of the run.

    Args:
        facts: Index of each edited row's fact, by which intervals are clustered, [edits].
    """
    names = [field.name for field in read_schema(paths[0]) if _is_numeric(field)] if len(facts) else []
    columns_at_once = max(1, _VALUES_AT_ONCE // max(1, len(facts)))
    estimates: dict[str, Estimate] = {}
    for start in range(0, len(names), columns_at_once):
        for name, column in _edited_columns(paths, names[start : start + columns_at_once]).items():
            finite = np.isfinite(column)
            if finite.any():
                estimates[name] = estimate_column(column[finite].tolist(), facts[finite].tolist())
    return estimates


def _edited_columns(paths: Sequence[Location], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of the edited rows by name, each [edits]; missing values are NaN."""
    columns = {name: array("d") for name in names}
    for path in paths:
        table = read_table(path, ["status", *names])
        table = table.filter(compute.equal(table.column("status"), EDITED))
        for name, values in columns.items():
            values.frombytes(table.column(name).cast(pyarrow.float64()).to_numpy().tobytes())
    return {name: np.frombuffer(values) for name, values in columns.items()}


def _is_numeric(field: pyarrow.Field) -> bool:
    return field.name != "index" and (pyarrow.types.is_floating(field.type) or pyarrow.types.is_integer(field.type))
