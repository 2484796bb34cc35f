"""One label of a study against every other label of its axis, both tasks together: the test of a claim "A beats B"."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report import attribution
from pipeline.report.differences import Difference, differences, edited
from pipeline.report.formatting import plus_minus, sign
from pipeline.run_folder.rows import Row
from pipeline.study.spec import Arm, StudyConfig


@dataclass(frozen=True)
class Comparison:
    """An arm with the compared label, and an arm that differs from it on that axis alone.

    Attributes:
        arm: The arm with the label.
        other: The arm with another label.
        n: Number of records that both arms edited.
        differences: Column -> arm minus other, clustered by fact; p corrected over all comparisons of the column.
    """

    arm: Arm
    other: Arm
    n: int
    differences: dict[str, Difference]


def comparisons(study: StudyConfig, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> list[Comparison]:
    """Every arm with the labels of `study.compared` against each arm that differs from it there alone.

    Args:
        rows: Result rows by the arm's folder.
    """
    by_arm = {folder: edited(of_arm) for folder, of_arm in rows.items()}
    pairs = [(arm, other) for arm in arms for other in arms if _is_against(study, arm, other)]
    tests = differences(
        {i: (by_arm[other.folder], by_arm[arm.folder]) for i, (arm, other) in enumerate(pairs)},
        tuple(dict.fromkeys((*study.columns, *study.further))),
    )
    return [
        Comparison(arm, other, len(by_arm[arm.folder].keys() & by_arm[other.folder].keys()), tests[i])
        for i, (arm, other) in enumerate(pairs)
    ]


def attributed(study: StudyConfig, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Sentences on what is due to the rephrases and what to an objective; empty without a section `attribution`.

    All arms with a label count together, on the records that its counterparts under the native loss and the control
    edited as well.
    """
    wanted = study.attribution
    if wanted is None:
        return []
    runs: dict[str, dict[str, Row]] = {label: {} for label in study.axes[wanted.axis]}
    for arm in arms:
        others = ", ".join(label for axis, label in arm.labels.items() if axis != wanted.axis)
        of_label = runs[arm.labels[wanted.axis]]
        of_label |= {f"{others}: {key}": row for key, row in edited(rows[arm.folder]).items()}
    return attribution.sentences(runs, wanted.native, wanted.control, wanted.objectives)


def _is_against(study: StudyConfig, arm: Arm, other: Arm) -> bool:
    has_label = all(arm.labels[axis] == label for axis, label in study.compared.items())
    differ = {axis for axis in arm.labels if arm.labels[axis] != other.labels[axis]}
    return has_label and bool(differ) and differ <= study.compared.keys()


def to_markdown(study: StudyConfig, compared: Sequence[Comparison]) -> str:
    """A Markdown table with one line per comparison and cells like `+.049 ±.020 ▲`."""
    shown = {column for comparison in compared for column in comparison.differences}
    columns = [column for column in (*study.columns, *study.further) if column in shown]
    fixed = [axis for axis in study.axes if axis not in study.compared]
    heads = [*fixed, "against", "n", *columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * (len(fixed) + 1) + "--:|" * (len(columns) + 1)]
    for comparison in compared:
        labels = [comparison.arm.labels[axis] for axis in fixed]
        figures = [_figure(comparison.differences.get(column)) for column in columns]
        lines.append("| " + " | ".join([*labels, _against(study, comparison), str(comparison.n), *figures]) + " |")
    text = (
        f"What *{', '.join(study.compared.values())}* gains over the others, both tasks together: mean difference on "
        "the same edits ± half of its 95% interval, clustered by fact. ▲/▼: paired t-test, p < .05 after Holm's "
        "correction over all lines of the column."
    )
    return text + "\n\n" + "\n".join(lines) + "\n"


def _against(study: StudyConfig, comparison: Comparison) -> str:
    return ", ".join(comparison.other.labels[axis] for axis in study.compared)


def _figure(difference: Difference | None) -> str:
    if difference is None:
        return ""
    plus = "+" if difference.mean >= 0 else ""
    return plus + plus_minus(difference) + sign(difference)


def to_csv(study: StudyConfig, compared: Sequence[Comparison]) -> str:
    """One CSV line per comparison and column."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*study.axes, "against", "column", "n", "difference", "low", "high", "p", "p_holm"])
    for comparison in compared:
        labels = [*comparison.arm.labels.values(), _against(study, comparison)]
        for column, change in comparison.differences.items():
            values = (change.mean, change.low, change.high, change.p, change.p_holm)
            writer.writerow([*labels, column, comparison.n, *(f"{value:.6g}" for value in values)])
    return stream.getvalue()
