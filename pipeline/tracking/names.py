"""Names of metrics in MLflow, whose pages sort metrics, and groups of charts, by name alone.

| in the order of the pages | |
|---|---|
| `metrics/rel`, `metrics/m_loc_near`, ... | main scores, `kept` |
| `records/edited`, `records/failed`, ... | counts |
| `score` | what runs are sorted by |
| `time/seconds_per_edit`, ... | cost |
| `training/curves/rel`, ... | losses by step, last because every other group says more of a run |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from odedit.evaluation.score import SCORE, score_of_means
from odedit.evaluation.statistics import SHOWN
from pipeline.run_folder.curves import Curve
from pipeline.run_folder.rows import KEPT

MOST = 40
"""Metrics of a run, at most."""
MOST_TERMS = 6
"""Losses with curves, three metrics each."""
METRICS, RECORDS, TIME, CURVES = "metrics/", "records/", "time/", "training/curves/"
TRIED = f"{RECORDS}tried"
"""Number of records of a trial at a rung, failed ones included."""
_COUNTS = {"n": "edited", "failed": "failed", "skipped": "skipped"}
_COSTS = {"seconds": "seconds_per_edit", "steps": "steps_per_edit", "peak_bytes": "peak_bytes_per_edit"}
Point = tuple[str, float, int]
"""Name, value and step."""


def of_scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """Score and main scores of a run, which are also those of its committed model.

    The score is first: comparisons of runs draw the metric that was logged first.
    """
    means = summary["metrics"] | {name: summary[name] for name in KEPT if name in summary}
    total = score_of_means(summary["metrics"], summary["failed"])
    scores = {SCORE: total} if math.isfinite(total) else {}
    return scores | {METRICS + name: float(means[name]["mean"]) for name in (*SHOWN, *KEPT) if name in means}


def of_run(summary: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a run, without its curves."""
    values = of_scores(summary) | {RECORDS + name: float(summary[key]) for key, name in _COUNTS.items()}
    means, wall = summary["metrics"], summary.get("wall_seconds")
    values |= {TIME + name: float(means[key]["mean"]) for key, name in _COSTS.items() if key in means}
    if wall:
        values |= {f"{TIME}seconds": float(wall), f"{TIME}edits_per_second": summary["n"] / wall}
    return values


def of_trial(report: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a trial of a search at one rung."""
    named = {"edits": TRIED, "failed": f"{RECORDS}failed", SCORE: SCORE}
    named |= {key: TIME + name for key, name in _COSTS.items()}
    left_out = ("worst_nll",)  # a curve
    return {
        named.get(key, METRICS + key): float(value)
        for key, value in report.items()
        if key not in left_out and not key.startswith("loss/") and math.isfinite(value)
    }


def of_curves(curves: Mapping[str, Curve]) -> Iterator[Point]:
    """Points of the curves, mean and both ends of the spread."""
    for name, curve in curves.items():
        yield from curve.named(CURVES + name)


def at_step(values: Mapping[str, float], step: int = 0) -> Iterable[Point]:
    """Points of metrics that have one value."""
    return ((name, value, step) for name, value in values.items())
