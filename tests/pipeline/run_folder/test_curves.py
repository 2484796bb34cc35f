"""Curves over edits: mean, spread, edits that stop early, losses that are left out."""

from __future__ import annotations

import math

import pytest

from pipeline.run_folder.curves import POINTS, mean_curves
from pipeline.run_folder.rows import EDITED, FAILED
from pipeline.tracking import names


def row(status: str = EDITED, **losses: list[float]) -> dict[str, object]:
    return {"status": status, "losses": losses}


def test_an_edit_that_has_stopped_keeps_its_last_value() -> None:
    rows = [row(rel=[2.0, 1.0]), row(FAILED, rel=[100.0]), row(rel=[4.0, 3.0, 2.0]), row()]
    curve = mean_curves(rows)["rel"]
    assert (curve.steps, curve.mean) == ([0, 1, 2], [3.0, 2.0, 1.5])
    assert (curve.low[0], curve.high[0]) == pytest.approx((2.2, 3.8))
    assert mean_curves(rows, max_edits=1)["rel"].mean == [2.0, 1.0]
    assert mean_curves(rows, max_edits=0) == {}


def test_what_says_nothing_is_left_out() -> None:
    rows = [row(own=[0.0, 0.0], lost=[math.nan] * 2, g_rel=[1.0, 1.0], another=[1.0, 2.0], loc=[math.nan, 1.0])]
    curves = mean_curves(rows)
    assert list(curves) == ["loc", "another"] and (curves["loc"].steps, curves["loc"].mean) == ([1], [1.0])
    assert list(mean_curves(rows, max_terms=1)) == ["loc"]


def test_a_long_run_stays_within_the_limits() -> None:
    losses = {name: [float(step % 7) + 1 for step in range(5000)] for name in ("objective", *"abcdefghij")}
    points = list(names.of_curves(mean_curves([row(**losses)] * 3, max_terms=names.MOST_TERMS)))
    assert len({name for name, _, _ in points}) == 3 * names.MOST_TERMS
    assert len(points) <= 3 * names.MOST_TERMS * 2 * POINTS
