"""Points of hidden states in a plane."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.report.cloud import HiddenStates, distance, drawing, plane


def cloud(after: np.ndarray, before: np.ndarray | None = None) -> HiddenStates:
    ids = tuple(f"e{number}" for number in range(after.shape[1]))
    return HiddenStates(ids, ("rel", "t_gen", "m_gen"), after if before is None else before, after)


def test_the_plane_keeps_distances_and_fits_the_square() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(3, 8, 2)) * [5.0, 1.0]
    turned, _ = np.linalg.qr(rng.normal(size=(64, 2)))
    before, after, share = plane(cloud(flat @ turned.T))
    assert share == pytest.approx(1.0) and np.array_equal(before, after)
    assert before.min() == pytest.approx(4.0) and before.max() == pytest.approx(96.0)
    drawn, real = (np.linalg.norm(points[0, 1:] - points[0, 0], axis=-1) for points in (before, flat))
    assert drawn / drawn[0] == pytest.approx(real / real[0])


def test_a_missing_probe_has_no_mark_and_changes_nothing_else() -> None:
    states = np.random.default_rng(1).normal(size=(3, 4, 16))
    states[2, 1] = np.nan
    panel, _ = drawing(cloud(states), [])["panels"]
    assert [len(edit["marks"]) for edit in panel["edits"]] == [3, 2, 3, 3]
    assert all(edit["marks"][-1] is edit["own"] and edit["own"]["probe"] == "rel" for edit in panel["edits"])
    assert panel["distance"] == panel["distance"], "a mean over the rephrases that are there"


def test_equal_states_are_in_the_middle() -> None:
    before, _, _ = plane(cloud(np.ones((3, 2, 4))))
    assert before == pytest.approx(np.full((3, 2, 2), 50.0))


def test_distances_are_relative_to_those_between_edits() -> None:
    # Edits at 0, 6 and 12 on a line, rephrases 1 and 3 away: (1 + 3) / 2 over (6 + 12 + 6) / 3.
    edits = np.array([[0.0], [6.0], [12.0]])
    assert distance(np.stack([edits, edits + 1, edits - 3])) == pytest.approx(2 / 8)
    assert np.isnan(distance(np.ones((3, 1, 4))))
