"""The five metrics, and the columns of a probe's scores.

The name of a column is the probe's name and an ending: `m_gen`, `m_gen_exact`, `m_gen_exact_before`. An entry of
`ANSWER_COLUMNS` or `LOCALITY_COLUMNS` adds a column, and `check_probe_name` refuses probe names that contain its words,
so no two probes write the same column. Imports torch only, because the checks of records read these names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from odedit.runtime.brief import brief


@dataclass(frozen=True)
class Metric:
    """A main metric, the score of a probe that every record has.

    Attributes:
        label: Name in tables and plots.
        group: Name of the mean that it is part of in a search.
        prompt: Name of its prompt in plots.
    """

    label: str
    group: str
    prompt: str


METRICS = {
    "rel": Metric("reliability", "reliability", "edit"),
    "t_gen": Metric("text generality", "generality", "text rephrase"),
    "m_gen": Metric("image generality", "generality", "image rephrase"),
    "t_loc": Metric("text locality", "locality", "unrelated question"),
    "m_loc": Metric("image locality", "locality", "unrelated picture"),
}
"""The five metrics of MMEdit (arXiv 2310.08475), in the order of every table."""

PORTABILITY = "port_gen"
"""Mean over the questions that follow from an edit (VLKEB, arXiv 2403.07350); by hop: `port_gen_1hop`."""
FURTHER = {PORTABILITY: Metric("portability", "portability", "question that follows")}
"""Metrics that tables show where a run has them."""


PARTS = {"m_loc_near": "image locality, near", "m_loc_far": "image locality, far"}
"""Labels of the parts of `m_loc`, for records with a near probe. A far answer hardly ever changes, so the mean hides
half of what spills over to near pictures; every table that shows `m_loc` shows the parts beside it.
"""


def groups() -> dict[str, tuple[str, ...]]:
    """Metrics of each group.

    >>> groups()["locality"]
    ('t_loc', 'm_loc')
    """
    names = dict.fromkeys(metric.group for metric in METRICS.values())
    return {group: tuple(name for name in METRICS if METRICS[name].group == group) for group in names}


@dataclass(frozen=True)
class Answer:
    """Answer of one model to one probe of one edit, on the CPU.

    Attributes:
        probe: Name of the probe.
        top_TR: First R choices at the positions that predict the target, `(T, R)`.
        target_T: Target tokens, padded.
        counted_T: False at padding and at white space in front of the answer.
        top_SR: First R choices at every position that is not padding, `(S, R)`; None: not measured.
        generated: Generated tokens before the answer's end; None: not generated.
        has_ended: True when the generated answer ended within the limit of tokens.
        is_target: True when the generated answer is the whole target.
    """

    probe: str
    top_TR: Tensor
    target_T: Tensor
    counted_T: Tensor
    top_SR: Tensor | None = None
    generated: Sequence[int] | None = None
    has_ended: bool = False
    is_target: bool = False

    __repr__ = brief

    @cached_property
    def counted_TR(self) -> Tensor:
        """First choices at the counted positions."""
        return self.top_TR[self.counted_T]

    @cached_property
    def right_T(self) -> Tensor:
        """True at the counted positions whose first choice is the target token."""
        return self.counted_TR[:, 0] == self.target_T[self.counted_T]


def _generated_right(answer: Answer) -> float | None:
    if answer.generated is None:
        return None
    return _share_of_equal(answer.generated, answer.target_T.tolist(), answer.counted_T)


def _mmedit_same(before: Answer, after: Answer) -> float | None:
    """Published locality: shares of equal first choices for text probes, of ten choices by rank for picture probes."""
    if before.top_SR is None or after.top_SR is None:
        return None
    same_SR = before.top_SR == after.top_SR
    return _share(same_SR if after.probe.startswith("m_") else same_SR[:, 0])


def _generated_same(before: Answer, after: Answer) -> float | None:
    if before.generated is None or after.generated is None:
        return None
    return _share_of_equal(before.generated, after.generated, after.counted_T)


def _generated_all_same(before: Answer, after: Answer) -> float | None:
    if before.generated is None or after.generated is None:
        return None
    return float((before.generated, before.has_ended) == (after.generated, after.has_ended))


def _same(before: Answer, after: Answer) -> Tensor:
    return before.counted_TR == after.counted_TR


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _share_of_equal(first: Sequence[int], second: Sequence[int], counted_T: Tensor) -> float:
    """Share of the counted positions at which two answers have the same token, or have both ended."""
    positions = counted_T.nonzero().flatten().tolist()
    return sum(first[index : index + 1] == second[index : index + 1] for index in positions) / len(positions)


ANSWER_COLUMNS: dict[str, Callable[[Answer], float | None]] = {
    "": lambda answer: _share(answer.right_T),
    "exact": lambda answer: float(answer.right_T.all()),
    "generated": _generated_right,
    "generated_exact": lambda answer: None if answer.generated is None else float(answer.is_target),
}
"""Ending to score of one answer; None leaves the column out. Each is also measured before the edit."""
LOCALITY_COLUMNS: dict[str, Callable[[Answer, Answer], float | None]] = {
    "": lambda before, after: _share(_same(before, after)[:, 0]),
    "whole": lambda before, after: float(_same(before, after)[:, 0].all()),
    "top10": lambda before, after: _share(_same(before, after)),
    "mmedit": _mmedit_same,
    "generated": _generated_same,
    "generated_exact": _generated_all_same,
}
"""Ending to score of a locality probe, from the answers before and after the edit; None leaves the column out."""
BEFORE, FAR, LOW, HIGH = "before", "far", "low", "high"
APPENDED = (BEFORE, FAR, LOW, HIGH)
"""Endings appended to other columns: the unedited model's score, a record's own (far) locality probe if it also has a
near probe, and the bounds of an interval.
"""


def words() -> frozenset[str]:
    """Words in the endings of columns, which are not allowed as details of a probe's name."""
    endings = (*ANSWER_COLUMNS, *LOCALITY_COLUMNS, *APPENDED)
    return frozenset(word for ending in endings for word in ending.split("_") if word)


def column(probe: str, *endings: str) -> str:
    """Name of a column.

    Raises:
        ValueError: An ending is in none of the tables of this module.

    >>> column("m_gen", "exact", BEFORE)
    'm_gen_exact_before'
    """
    parts = [part for ending in endings for part in ending.split("_") if part]
    unknown = set(parts) - words()
    if unknown:
        raise ValueError(f"column of {probe!r}: got ending {min(unknown)!r}, expected {', '.join(sorted(words()))}.")
    return "_".join((probe, *parts))
