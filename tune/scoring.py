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

Report = dict[str, Any]
"""Figures of a trial at a rung: edits and metrics."""


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
    figures = {
        "edits": edits,
        "failed": sum(row["status"] == FAILED for row in rows),
        SCORE: score(judged),
        **metrics,
        **combined,
        **{name: _mean(done, name) for name in ("steps", "seconds", "worst_nll")},
    }
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _counts(row: Row) -> bool:
    return row["status"] in (EDITED, FAILED)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    numbers = [float(value) for row in rows if (value := row.get(name)) is not None]
    finite = [number for number in numbers if math.isfinite(number)]
    return fmean(finite) if finite else None
