"""Histograms and curves of a page."""

from __future__ import annotations

import math

import pytest

from pipeline.report.figures import histograms, loss_curves, training_curves


@pytest.mark.parametrize(
    ("steps", "bars"),
    [
        ([1, 2, 2], [("1", 1), ("2", 2)]),
        ([2, 24], [("2 to 4", 1), *((f"{low} to {low + 2}", 0) for low in range(5, 23, 3)), ("23 to 25", 1)]),
        ([1, 20], [("1 to 2", 1), *((f"{low} to {low + 1}", 0) for low in range(3, 19, 2)), ("19 to 20", 1)]),
    ],
)
def test_bins_of_steps_are_whole_numbers_of_equal_width(steps: list[float], bars: list[tuple[str, int]]) -> None:
    (drawn,) = histograms({"steps": steps})
    assert drawn["bars"] == bars and (drawn["low"], drawn["high"]) == (bars[0][0].split()[0], bars[-1][0].split()[-1])


def test_shares_go_from_0_to_1_and_a_constant_has_no_histogram() -> None:
    (drawn,) = histograms({"rel": [1.0, 1.0], "steps": [400.0, 400.0], "seconds": [0.5]})
    assert (drawn["name"], drawn["low"], drawn["high"]) == ("rel", "0", "1")
    assert drawn["bars"][-1] == ("0.9 to 1", 2) and len(drawn["bars"]) == 10


def test_a_curve_of_a_training_has_its_ends_and_a_single_value_no_line() -> None:
    falling, single = training_curves({"worst_nll": [8.0, 4.0, math.nan, 0.0], "near_firings": [0.25]}, [50.0, 1200.0])
    assert falling["points"] == "0,2 50,20 100,38"
    assert (falling["first"], falling["last"], falling["steps"]) == ("8", "0", "step 50 to 1,200")
    assert (single["label"], single["last"], single["points"]) == ("near firings", "0.25", "")


def test_loss_curves_are_thinned_and_those_of_zeros_are_left_out() -> None:
    drawn = loss_curves({"rel": [float(step) for step in range(500)], "own": [0.0] * 9, "kl": [None, 1.0]})
    assert list(drawn) == ["rel"] and len(drawn["rel"]) == 60
    assert (drawn["rel"][0], drawn["rel"][-1]) == (0.0, 499.0)
