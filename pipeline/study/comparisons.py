"""One label of a study against every other of its axis: what a claim "A beats B" needs.

Both tasks count together, an edit weighs the same in either. What is compared is said before, in the study's file.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from odedit.evaluation.statistics import PairedDifference, holm, paired
from pipeline.report.formatting import plus_minus, sign
from pipeline.run_folder.rows import EDITED, Row
from pipeline.study.spec import Arm, StudyConfig


@dataclass(frozen=True)
class Comparison:
    """An arm that has the label, and one that has another and is otherwise the same.

    Attributes:
        arm, other: The two.
        n: Edits that both have.
        differences: Column to the arm's value minus the other's, clustered by fact.
        p_holm: Column to p after Holm's correction for all comparisons of that column.
    """

    arm: Arm
    other: Arm
    n: int
    differences: dict[str, PairedDifference]
    p_holm: dict[str, float]


def comparisons(study: StudyConfig, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> list[Comparison]:
    """Every arm with the label `study.compared` names, against each arm that differs from it there alone."""
    columns = tuple(dict.fromkeys((*study.columns, *study.further)))
    edited = {name: {row["edit_id"]: row for row in found if row["status"] == EDITED} for name, found in rows.items()}
    pairs = [(arm, other) for arm in arms for other in arms if _is_against(study, arm, other)]
    found = [paired(edited[other.folder], edited[arm.folder], columns) for arm, other in pairs]
    corrected = {
        column: holm({str(place): one[column].p for place, one in enumerate(found) if column in one})
        for column in columns
    }
    return [
        Comparison(
            arm,
            other,
            len(edited[arm.folder].keys() & edited[other.folder].keys()),
            one,
            {column: corrected[column][str(place)] for column in columns if str(place) in corrected[column]},
        )
        for place, ((arm, other), one) in enumerate(zip(pairs, found, strict=True))
    ]


def _is_against(study: StudyConfig, arm: Arm, other: Arm) -> bool:
    has_label = all(arm.labels[axis] == label for axis, label in study.compared.items())
    differ = {axis for axis in arm.labels if arm.labels[axis] != other.labels[axis]}
    return has_label and bool(differ) and differ <= study.compared.keys()


def to_markdown(study: StudyConfig, found: Sequence[Comparison]) -> str:
    """One line per comparison: `+.049 ±.020 ▲`."""
    columns = [c for c in (*study.columns, *study.further) if any(c in one.differences for one in found)]
    fixed = [axis for axis in study.axes if axis not in study.compared]
    name = ", ".join(study.compared.values())
    heads = [*fixed, "against", "n", *columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * (len(fixed) + 1) + "--:|" * (len(columns) + 1)]
    for one in found:
        labels = [one.arm.labels[axis] for axis in fixed]
        against = ", ".join(one.other.labels[axis] for axis in study.compared)
        lines.append("| " + " | ".join([*labels, against, str(one.n), *(_figure(one, c) for c in columns)]) + " |")
    text = (
        f"What *{name}* gains over the others, both tasks together: mean difference on the same edits ± half of its "
        "95% interval, clustered by fact. ▲/▼: paired t-test, p < .05 after Holm's correction over all lines of the "
        "column."
    )
    return text + "\n\n" + "\n".join(lines) + "\n"


def _figure(one: Comparison, column: str) -> str:
    if column not in one.differences:
        return ""
    change = one.differences[column]
    plus = "+" if change.mean >= 0 else ""
    return plus + plus_minus(change) + sign(change, one.p_holm.get(column, math.nan))


def to_csv(study: StudyConfig, found: Sequence[Comparison]) -> str:
    """One line per comparison and column."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*study.axes, "against", "column", "n", "difference", "low", "high", "p", "p_holm"])
    for one in found:
        against = ", ".join(one.other.labels[axis] for axis in study.compared)
        for column, change in one.differences.items():
            values = (change.mean, change.low, change.high, change.p, one.p_holm.get(column, math.nan))
            labels = one.arm.labels.values()
            writer.writerow([*labels, against, column, one.n, *(f"{value:.6g}" for value in values)])
    return stream.getvalue()
