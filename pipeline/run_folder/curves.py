"""Curves of the optimisation over many edits: mean and spread of each loss by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pipeline.run_folder.rows import EDITED, Row

POINTS = 50
"""Steps of a curve, about."""
_FIRST = ("objective", "worst_nll", "rel", "gen", "loc", "own", "penalty", "lambda")
"""Losses that say most; those of an objective's own follow."""
_ENVIRONMENT = "g_"
"""Prefix of the risks of single environments, which are left out."""
LOW, HIGH = 10, 90
"""Percentiles that bound the spread."""


@dataclass(frozen=True)
class Curve:
    """A loss over edits.

    Attributes:
        steps: Steps of the values.
        mean: Mean over the edits.
        low, high: 10th and 90th percentile of the edits.
    """

    steps: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    def named(self, name: str) -> Iterator[tuple[str, float, int]]:
        """Points of its three curves: name, value, step."""
        for ending, values in (("", self.mean), (f"_p{LOW}", self.low), (f"_p{HIGH}", self.high)):
            for step, value in zip(self.steps, values, strict=True):
                yield name + ending, value, step


def mean_curves(rows: Iterable[Row], max_edits: int | None = None, max_terms: int | None = None) -> dict[str, Curve]:
    """Curves of the edited rows by loss, those that say most first, without those that are zero throughout.

    An edit that has stopped keeps its last value.

    Args:
        rows: Rows with `status` and `losses`.
        max_edits: Number of edits, the first; None: all.
        max_terms: Number of losses; None: all.
    """
    edited = (row["losses"] for row in rows if row["status"] == EDITED and row.get("losses"))
    losses = list(islice(edited, max_edits))
    names = dict.fromkeys((*_FIRST, *sorted({name for of_edit in losses for name in of_edit})))
    curves = ((name, _curve(losses, name)) for name in names if not name.startswith(_ENVIRONMENT))
    return dict(islice(((name, curve) for name, curve in curves if curve is not None), max_terms))


def _curve(losses: Sequence[Mapping[str, Sequence[float]]], name: str) -> Curve | None:
    """Curve of one loss; None if no edit has it, or it is zero throughout."""
    known = [values for of_edit in losses if (values := of_edit.get(name))]
    if not known:
        return None
    length = max(map(len, known))
    steps = np.arange(0, length, max(1, length // POINTS))
    drawn = np.array(
        [[each[min(step, len(each) - 1)] for step in steps.tolist()] for each in known], dtype=np.float64
    )  # [E, S]
    drawn[~np.isfinite(drawn)] = np.nan
    is_known = np.isfinite(drawn).any(axis=0)
    drawn, steps = drawn[:, is_known], steps[is_known]
    if not np.nan_to_num(drawn).any():
        return None
    low, high = np.nanpercentile(drawn, (LOW, HIGH), axis=0)
    return Curve(steps.tolist(), np.nanmean(drawn, axis=0).tolist(), low.tolist(), high.tolist())
