"""Where edits and their rephrases lie: hidden states in the plane of their two largest principal components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odedit.evaluation.columns import METRICS
from odedit.runtime.brief import brief
from pipeline.run_folder.outcomes import EditOutcome

SHOWN_EDITS = 100
"""Edits whose states a page shows, the worst."""
_MARGIN = 4.0
"""Space around the points, of a drawing of 100 x 100."""


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states that predict the first answer token, of edits and their rephrases.

    Attributes:
        edit_ids: The edits.
        probes: Names of the probes, the edit itself first.
        before: States without the edits, [probes, edits, hidden]; NaN where an edit lacks the probe.
        after: States with each edit on its own probes, as `before`.
    """

    edit_ids: tuple[str, ...]
    probes: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray

    __repr__ = brief


def plane(states: HiddenStates) -> tuple[np.ndarray, np.ndarray, float]:
    """Points before and after, [probes, edits, 2] in a square of 100, and the share of variance that they show."""
    stacked = np.stack([states.before, states.after]).astype(np.float64)
    known = np.isfinite(stacked).all(-1)
    centred = stacked - stacked[known].mean(0)
    _, sizes, axes = np.linalg.svd(centred[known], full_matrices=False)
    flat = centred @ axes[:2].T
    low, high = flat[known].min(0), flat[known].max(0)
    # One scale for both axes, so that distances can be compared.
    scale = (100 - 2 * _MARGIN) / max(float((high - low).max()), 1e-9)
    points = 50 + scale * (flat - (low + high) / 2)
    total = float((sizes**2).sum())
    return points[0], points[1], float((sizes[:2] ** 2).sum()) / total if total else 1.0


def distance(cloud: np.ndarray) -> float:
    """Mean distance between an edit and its rephrases, divided by that between edits; NaN for a single edit.

    Args:
        cloud: States, [probes, edits, hidden], the edit itself first.
    """
    edit, rephrases = cloud[0], cloud[1:]
    to_rephrases = np.linalg.norm(rephrases - edit, axis=-1)
    pairs = np.linalg.norm(edit[:, None] - edit[None], axis=-1)
    count, known = len(edit), np.isfinite(to_rephrases)
    if count < 2 or not known.any():
        return float("nan")
    return float(to_rephrases[known].mean() / (pairs.sum() / (count * (count - 1))))


def drawing(states: HiddenStates, outcomes: Sequence[EditOutcome]) -> dict[str, Any]:
    """What the page draws: a panel before and one after the edits."""
    before, after, share = plane(states)
    by_id = {outcome.edit_id: outcome for outcome in outcomes}
    panels = [
        {"name": name, "distance": distance(cloud), "edits": list(_edits(states, points, by_id, is_after=is_after))}
        for name, cloud, points, is_after in (
            ("before", states.before, before, False),
            ("after", states.after, after, True),
        )
    ]
    labels = {name: METRICS[name].prompt for name in states.probes}
    return {"panels": panels, "share": share, "probes": labels, "count": len(states.edit_ids)}


def _edits(
    states: HiddenStates, points: np.ndarray, outcomes: Mapping[str, EditOutcome], *, is_after: bool
) -> Iterator[dict[str, Any]]:
    """An edit's marks, its own last so that it stays visible, and the lines from it to the others."""
    for number, edit_id in enumerate(states.edit_ids):
        outcome = outcomes.get(edit_id)
        judged = {} if outcome is None else {probe.name: probe for probe in outcome.probes}
        marks = []
        for probe, (x, y) in zip(states.probes, points[:, number].round(2).tolist(), strict=True):
            known = judged.get(probe)
            is_right = None if known is None else known.is_right if is_after else known.was_right
            # A missing probe is NaN, which differs from itself.
            if x == x:
                marks.append({"probe": probe, "x": x, "y": y, "is_right": is_right})
        own = marks[0]
        question = "" if outcome is None or not outcome.probes else outcome.probes[0].prompt or ""
        yield {"id": edit_id, "question": question[:80], "own": own, "marks": [*marks[1:], own]}
