"""Figures of a trial from the rows of its edits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from odedit.evaluation.score import score
from odedit.evaluation.statistics import MAIN
from pipeline.run_folder.rows import EDITED, FAILED, Row
from tune.config import COMBINED, SCORE

CURVE_POINTS = 50
Report = dict[str, Any]
"""Figures of a trial at a rung: edits, metrics and losses."""


def report(rows: Sequence[Row], edits: int) -> Report:
    """Means over a trial's edits so far.

    A failed edit counts as 0 in every metric: settings must not win by failing hard edits.

    Args:
        rows: Result rows of the trial.
        edits: Number of records at the rung, failed ones included.
    """
    judged = [row if row["status"] == EDITED else dict.fromkeys(MAIN, 0.0) for row in rows if _counts(row)]
    metrics = {metric: mean for metric in MAIN if (mean := _mean(judged, metric)) is not None}
    combined = {
        name: fmean(metrics[part] for part in parts if part in metrics)
        for name, parts in COMBINED.items()
        if any(part in metrics for part in parts)
    }
    done = [row for row in rows if row["status"] == EDITED]
    last = {name: _mean([row["losses"] for row in done], name, last=True) for name in _loss_names(done)}
    figures = {
        "edits": edits,
        "failed": sum(row["status"] == FAILED for row in rows),
        SCORE: score(judged),
        **metrics,
        **combined,
        **{f"loss/{name}": value for name, value in last.items()},
        **{name: _mean(done, name) for name in ("steps", "seconds", "worst_nll")},
    }
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _counts(row: Row) -> bool:
    return row["status"] in (EDITED, FAILED)


def _loss_names(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name, values in (row.get("losses") or {}).items() if values})


def _mean(rows: Sequence[Mapping[str, Any]], name: str, *, last: bool = False) -> float | None:
    values = [row.get(name) for row in rows if row]
    numbers = [float(value[-1] if last else value) for value in values if value is not None and value != []]
    finite = [number for number in numbers if math.isfinite(number)]
    return fmean(finite) if finite else None


def curves(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Mean of each loss over all edits at about 50 steps; an edit that has stopped keeps its last value."""
    done = [row for row in rows if row["status"] == EDITED and row.get("losses")]
    by_loss: dict[str, list[tuple[int, float]]] = {}
    for name in _loss_names(done):
        columns = [values for row in done if (values := row["losses"].get(name))]
        length = max(map(len, columns))
        steps = range(0, length, max(1, length // CURVE_POINTS))
        points = [(step, fmean(values[min(step, len(values) - 1)] for values in columns)) for step in steps]
        by_loss[name] = [(step, value) for step, value in points if math.isfinite(value)]
    return by_loss
