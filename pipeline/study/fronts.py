"""Fronts: generality against near locality as the stop and the locality weight vary, and their comparison.

An arm is a point in the plane of near locality (x) and generality (y). The front of an objective is the largest
generality that some mixture of its arms reaches at a near locality of at least x: the upper right part of the points'
convex hull. An objective is better than the baseline where its front lies above the baseline's at the same x, whatever
the stop of either.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from odedit.evaluation.statistics import PairedDifference
from odedit.runtime.brief import brief
from pipeline.report.differences import Difference, Rows, corrected, edited, fact
from pipeline.report.formatting import number, plus_minus, sign
from pipeline.run_folder.rows import Row
from pipeline.study.spec import Arm, StudyConfig

Point = tuple[float, float]


@dataclass(frozen=True)
class Level:
    """The fronts of a label and of the baseline at the near locality of one of the baseline's points.

    Attributes:
        panel: Labels of the axes that the fronts are not made of.
        label: Label of the compared front.
        column: Column of generality.
        at: Labels of the baseline's point on the axes that are swept.
        near: Near locality of that point.
        difference: Height of the label's front minus that of the baseline; None if the label's front ends at a lower
            near locality.
    """

    panel: tuple[str, ...]
    label: str
    column: str
    at: str
    near: float
    difference: Difference | None


def front(points: Sequence[Point]) -> list[Point]:
    """Vertices of the front, ascending in x and descending in y.

    >>> front([(0.5, 0.9), (0.7, 0.85), (0.9, 0.8), (0.6, 0.5), (0.95, 0.2)])
    [(0.5, 0.9), (0.9, 0.8), (0.95, 0.2)]
    """
    vertices: list[Point] = []
    for point in sorted(points, key=lambda each: (-each[0], -each[1])):
        if vertices and point[1] <= vertices[-1][1]:
            continue
        while len(vertices) > 1 and _is_below(vertices[-1], vertices[-2], point):
            vertices.pop()
        vertices.append(point)
    return vertices[::-1]


def _is_below(middle: Point, right: Point, left: Point) -> bool:
    """True when the middle point is not above the line between its neighbours."""
    (x, y), (x_right, y_right), (x_left, y_left) = middle, right, left
    return (y - y_left) * (x_right - x_left) <= (y_right - y_left) * (x - x_left)


def height(points: Sequence[Point], x: float) -> float:
    """Height of the front at x; beyond its right end, that of the end."""
    xs, ys = zip(*front(points), strict=True)
    return float(np.interp(x, xs, ys))


def levels(study: StudyConfig, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> list[Level]:
    """Every front against the baseline's, at each vertex of the baseline's front; p by Holm over all of a column.

    Records of both tasks count, those that all arms of both fronts edited. The test is the jackknife over facts, which
    repeats everything, the vertex's near locality included.

    Args:
        rows: Result rows by the arm's folder.
    """
    assert study.fronts is not None, "a study with fronts"
    made: list[Level] = []
    for column in study.fronts.columns:
        found: list[tuple[Level, PairedDifference | None]] = []
        for panel, of_panel in _panels(study, arms).items():
            labels = dict.fromkeys(_label(study, arm) for arm in of_panel)
            by_label = {label: [arm for arm in of_panel if _label(study, arm) == label] for label in labels}
            base = by_label.pop(_baseline(study), [])
            for label, of_label in by_label.items() if base else ():
                found += _against(study, panel, label, column, of_label, base, rows)
        tests = {index: test for index, (_, test) in enumerate(found) if test is not None}
        differences = corrected(tests)
        made += [_tested(level, differences.get(index)) for index, (level, _) in enumerate(found)]
    return made


def _tested(level: Level, difference: Difference | None) -> Level:
    return Level(level.panel, level.label, level.column, level.at, level.near, difference)


def _against(
    study: StudyConfig,
    panel: tuple[str, ...],
    label: str,
    column: str,
    of_label: Sequence[Arm],
    base: Sequence[Arm],
    rows: Mapping[str, Sequence[Row]],
) -> list[tuple[Level, PairedDifference | None]]:
    assert study.fronts is not None, "a study with fronts"
    values = _Values.of([edited(rows[arm.folder]) for arm in (*of_label, *base)], (study.fronts.near, column))
    if values is None:
        return []
    own, other = slice(len(of_label)), slice(len(of_label), None)
    every = values.points()
    ends_at = max(x for x, _ in every[own])
    found = []
    for vertex in front(every[other]):
        index = len(of_label) + every[other].index(vertex)
        arm = base[index - len(of_label)]
        at = ", ".join(arm.labels[axis] for axis in study.fronts.over)
        level = Level(panel, label, column, at, vertex[0], None)

        def above(points: Sequence[Point], index: int = index) -> float:
            x, y = points[index]
            return height(points[own], x) - y

        found.append((level, values.jackknife(above) if vertex[0] <= ends_at else None))
    return found


@dataclass(frozen=True)
class _Values:
    """Two columns of several arms on their common records, summed by fact.

    Attributes:
        sums_FAC: Sums over each fact's records, `(facts, arms, 2)`.
        count_F: Number of records of each fact.
    """

    sums_FAC: np.ndarray
    count_F: np.ndarray

    __repr__ = brief

    @classmethod
    def of(cls, runs: Sequence[Rows], columns: tuple[str, str]) -> _Values | None:
        """None without a common record that has both columns in all runs."""
        has_both = (
            {key for key, row in rows.items() if all(row.get(column) is not None for column in columns)}
            for rows in runs
        )
        common = sorted(set.intersection(*has_both))
        if not common:
            return None
        facts = list(dict.fromkeys(fact(runs[0][key]) for key in common))
        row_of = {name: index for index, name in enumerate(facts)}
        sums, count = np.zeros((len(facts), len(runs), 2)), np.zeros(len(facts))
        for key in common:
            index = row_of[fact(runs[0][key])]
            sums[index] += [[run[key][column] for column in columns] for run in runs]
            count[index] += 1
        return cls(sums, count)

    def points(self, left_out: int | None = None) -> list[Point]:
        """Means of every arm, without one fact."""
        sums, count = self.sums_FAC.sum(axis=0), self.count_F.sum()
        if left_out is not None:
            sums, count = sums - self.sums_FAC[left_out], count - self.count_F[left_out]
        return [(float(x), float(y)) for x, y in sums / count]

    def jackknife(self, statistic: Callable[[Sequence[Point]], float]) -> PairedDifference:
        """The statistic with its 95% interval and p by Student's t (Efron and Stein, 1981)."""
        from scipy import stats

        value, num_facts = statistic(self.points()), len(self.count_F)
        n = int(self.count_F.sum())
        if num_facts < 2:
            return PairedDifference(value, value, value, math.nan, n)
        without = np.array([statistic(self.points(index)) for index in range(num_facts)])
        error = math.sqrt((num_facts - 1) / num_facts * float(((without - without.mean()) ** 2).sum()))
        if error < 1e-12:
            return PairedDifference(value, value, value, 1.0 if abs(value) < 1e-12 else math.nan, n)
        half = error * float(stats.t.ppf(0.975, num_facts - 1))
        p = float(2 * stats.t.sf(abs(value) / error, num_facts - 1))
        return PairedDifference(value, value - half, value + half, p, n)


def _panels(study: StudyConfig, arms: Sequence[Arm]) -> dict[tuple[str, ...], list[Arm]]:
    """Arms by their labels on the axes that neither name a front nor are swept."""
    assert study.fronts is not None, "a study with fronts"
    apart = [axis for axis in study.axes if axis != study.fronts.of and axis not in study.fronts.over]
    panels: dict[tuple[str, ...], list[Arm]] = {}
    for arm in arms:
        panels.setdefault(tuple(arm.labels[axis] for axis in apart), []).append(arm)
    return panels


def _label(study: StudyConfig, arm: Arm) -> str:
    assert study.fronts is not None, "a study with fronts"
    return arm.labels[study.fronts.of]


def _baseline(study: StudyConfig) -> str:
    assert study.fronts is not None, "a study with fronts"
    return study.fronts.against


def verdict(of_front: Sequence[Level]) -> str:
    """Where a front lies: `outside`, `inside`, `crosses`, or `not told apart`, and `ends earlier` where it does."""
    signs = {
        level.difference.mean > 0 for level in of_front if level.difference is not None and level.difference.is_clear
    }
    text = {(): "not told apart", (True,): "outside", (False,): "inside"}.get(tuple(signs), "crosses")
    return text + (", ends earlier" if any(level.difference is None for level in of_front) else "")


def to_markdown(study: StudyConfig, found: Sequence[Level]) -> str:
    """A Markdown table for each column: a line for each front, with the verdict and every level."""
    assert study.fronts is not None, "a study with fronts"
    blocks = [
        f"Fronts over {' and '.join(study.fronts.over)}: height above that of *{_baseline(study)}* at the near "
        f"locality (`{study.fronts.near}`, in brackets) of each of its points, both tasks together; half of the 95% "
        "interval by the jackknife over facts, ▲/▼: p < .05 after Holm's correction over all levels of the column. "
        "`-`: the front ends at a lower near locality."
    ]
    for column in study.fronts.columns:
        fronts: dict[tuple[str, ...], list[Level]] = {}
        for level in found:
            if level.column == column:
                fronts.setdefault((*level.panel, level.label), []).append(level)
        lines = [f"**`{column}`**", ""]
        lines += ["| front | verdict | levels |", "|---|---|---|"]
        for names, of_front in fronts.items():
            cells = ", ".join(f"{_figure(level)} ({level.at}: {number(level.near)})" for level in of_front)
            lines.append(f"| {', '.join(names)} | {verdict(of_front)} | {cells} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _figure(level: Level) -> str:
    if level.difference is None:
        return "-"
    plus = "+" if level.difference.mean >= 0 else ""
    return plus + plus_minus(level.difference) + sign(level.difference)


def to_csv(found: Sequence[Level]) -> str:
    """One CSV line per front, column and level."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["panel", "front", "column", "at", "near", "difference", "low", "high", "p", "p_holm"])
    for level in found:
        change = level.difference
        figures = ["" for _ in range(5)]
        if change is not None:
            figures = [f"{value:.6g}" for value in (change.mean, change.low, change.high, change.p, change.p_holm)]
        panel = ", ".join(level.panel)
        writer.writerow([panel, level.label, level.column, level.at, f"{level.near:.6g}", *figures])
    return stream.getvalue()
