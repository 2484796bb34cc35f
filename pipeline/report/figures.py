"""Histograms and curves of a page, as the numbers that its template draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from odedit.evaluation.statistics import SHOWN
from pipeline.report.formatting import LABELS, plain

STEPS = "steps"
MEASURED = (*SHOWN, STEPS, "seconds", "worst_nll")
"""Columns whose values have a histogram."""
NAMES = LABELS | {
    "seconds": "seconds per edit",
    STEPS: "steps",
    "worst_nll": "least likely token's NLL at the end",
}
"""Columns of a page spelled out."""
_CURVES = {"worst_nll": "least likely token's NLL over all records", "loss": "loss"}
_MAX_POINTS, _BINS = 60, 10
_HEIGHT = 40
"""Height of a drawing; its width is 100."""


def histograms(values: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Counts of each column's values in at most ten equal bins; shares from 0 to 1, steps in whole numbers."""
    drawn = []
    for name, column in values.items():
        if len(column) < 2 or (name not in SHOWN and min(column) == max(column)):
            continue
        edges = _edges(name, column)
        # Of whole numbers, a bin's upper edge is not in it.
        bins = [(low, high - (name == STEPS)) for low, high in pairwise(edges)]
        spans = [plain(low) if low == high else f"{plain(low)} to {plain(high)}" for low, high in bins]
        counts = np.histogram(column, bins=edges)[0].tolist()
        drawn.append(
            {"name": name if name in SHOWN else None, "label": NAMES[name], "low": plain(bins[0][0]),
             "high": plain(bins[-1][1]), "bars": list(zip(spans, counts, strict=True))}
        )  # fmt: skip
    return drawn


def _edges(name: str, column: Sequence[float]) -> list[float]:
    low, high = (0.0, 1.0) if name in SHOWN else (min(column), max(column))
    if name != STEPS:
        return [float(edge) for edge in np.linspace(low, high, _BINS + 1)]
    width = -(-(high - low + 1) // _BINS)
    return [float(edge) for edge in np.arange(low, high + width + 1, width)]


def training_curves(curves: Mapping[str, Sequence[float]], steps: Sequence[float]) -> list[dict[str, Any]]:
    """Curves of a training, each with its first and last value and the points of its line.

    Args:
        curves: Figures by name; those with a single value have no line.
        steps: Steps of the figures; empty: not known.
    """
    drawn = []
    for name, values in curves.items():
        finite = [value for value in values if np.isfinite(value)]
        if not finite:
            continue
        low, high = min(finite), max(finite)
        shown = thinned(finite)
        points = [
            f"{100 * index / (len(shown) - 1):.4g},{_HEIGHT - 2 - (_HEIGHT - 4) * (value - low) / (high - low):.4g}"
            for index, value in enumerate(shown)
            if high > low
        ]
        drawn.append(
            {"label": _CURVES.get(name, name.replace("_", " ")), "first": plain(finite[0]), "last": plain(finite[-1]),
             "points": " ".join(points), "steps": f"step {plain(steps[0])} to {plain(steps[-1])}" if steps else None}
        )  # fmt: skip
    return drawn


def loss_curves(losses: Mapping[str, Sequence[float | None]]) -> dict[str, list[float]]:
    """The curves that are not zero throughout, at most 60 points each."""
    drawn = {}
    for name, values in losses.items():
        finite = [value for value in values if value is not None and np.isfinite(value)]
        if len(finite) > 1 and any(finite):
            drawn[name] = [short(value) for value in thinned(finite)]
    return drawn


def thinned(values: Sequence[float]) -> list[float]:
    """At most 60 of the values, equally far apart, the first and the last among them."""
    chosen = np.linspace(0, len(values) - 1, min(len(values), _MAX_POINTS)).round().astype(int)
    return [values[index] for index in chosen]


def short(value: float | None) -> Any:
    """The value with four digits; None if it is missing or not finite."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")
