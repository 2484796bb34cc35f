"""What is left of earlier edits in a model that was made one record after another, by the number of edits in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from odedit.ways.base import CommittedInfo
from odedit.ways.sequential import RETENTION, SCORED
from pipeline.run_folder.workspace import STEP


@dataclass(frozen=True)
class Check:
    """Mean scores of all edits so far.

    Attributes:
        edits: Number of edits in the model.
        scores: Means by score.
    """

    edits: int
    scores: Mapping[str, float]


def checks(info: CommittedInfo) -> list[Check]:
    """The checks of a model in order; none for one that was not made one record after another."""
    curves: Mapping[str, Sequence[float]] = info.details.get("curves") or {}
    of_scores = {name: curves[RETENTION + name] for name in SCORED if RETENTION + name in curves}
    if not of_scores:
        return []
    return [
        Check(int(edits), {name: each[index] for name, each in of_scores.items()})
        for index, edits in enumerate(curves[STEP])
    ]
