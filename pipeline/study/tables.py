"""Tables of a study from its result rows: means, differences to the baseline and tests, as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any

from odedit.evaluation.statistics import Estimate
from pipeline.report.differences import Difference, differences, edited, fact, means
from pipeline.report.formatting import plus_minus, sign
from pipeline.run_folder.rows import FAILED, KEPT, SKIPPED, Row
from pipeline.study.spec import Arm, StudyConfig
from pipeline.tracking.client import Table

TASKS = {"vqa": "Questions", "caption": "Captions"}
_BOTH = {"all": "Questions and captions"}
"""Tasks of a study of models, which hold the records of both."""
_ALWAYS = ("worst_nll", "steps", "seconds")


@dataclass(frozen=True)
class Cell:
    """One arm on one task.

    Attributes:
        arm: The arm.
        task: `vqa`, `caption`, or `all` in a study of models.
        n: Number of edited records.
        failed: Number of failed records.
        skipped: Number of skipped records.
        at_stop: Share of the edits that reached the stopping criterion before the bound on steps.
        means: Column -> mean and interval.
        differences: Column -> arm minus its baseline on the records that both edited, p corrected over all arms of the
            task; empty for a baseline.
    """

    arm: Arm
    task: str
    n: int
    failed: int
    skipped: int
    at_stop: float
    means: dict[str, Estimate]
    differences: dict[str, Difference]


def cells(
    study: StudyConfig,
    arms: Sequence[Arm],
    rows: Mapping[str, Sequence[Row]],
    kept: Mapping[str, Sequence[Row]] = MappingProxyType({}),
) -> list[Cell]:
    """Every arm on every task that has records.

    Args:
        rows: Result rows by the arm's folder.
        kept: Rows of the pool's records that an arm's models were asked, with the columns `KEPT`.
    """
    columns = tuple(dict.fromkeys((*study.columns, *study.further, *study.plot.columns, *study.plot.front)))
    made: list[Cell] = []
    for task in tasks(study):
        of_task = {folder: [row for row in of_arm if task in (row["task"], *_BOTH)] for folder, of_arm in rows.items()}
        by_arm = {folder: edited(of_arm) for folder, of_arm in of_task.items()}
        pairs = {
            arm.folder: (by_arm[base.folder], by_arm[arm.folder])
            for arm in arms
            if (base := baseline_of(study, arm, arms)) is not None
        }
        tests = differences(pairs, columns)
        made += [
            _cell(arm, task, of_task[arm.folder], columns, tests.get(arm.folder, {}), kept.get(arm.folder, ()))
            for arm in arms
            if of_task[arm.folder]
        ]
    return made


def tasks(study: StudyConfig) -> Mapping[str, str]:
    """Names of the study's tasks."""
    return TASKS if study.models is None else _BOTH


def _cell(
    arm: Arm,
    task: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    differences: dict[str, Difference],
    kept: Sequence[Row],
) -> Cell:
    done = list(edited(rows).values())
    return Cell(
        arm=arm,
        task=task,
        n=len(done),
        failed=sum(row["status"] == FAILED for row in rows),
        skipped=sum(row["status"] == SKIPPED for row in rows),
        at_stop=sum(row["stop_reason"] != "max_steps" for row in done) / max(len(done), 1),
        means=means(done, (*columns, *_ALWAYS)) | means(kept, KEPT),
        differences=differences,
    )


def baseline_of(study: StudyConfig, arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that has the baseline's labels and otherwise the labels of `arm`; None for the baseline itself."""
    wanted = {**arm.labels, **study.baseline}
    if not study.baseline or wanted == arm.labels:
        return None
    return next((other for other in arms if other.labels == wanted), None)


def to_csv(study: StudyConfig, cells: Sequence[Cell]) -> str:
    """`to_table` as CSV."""
    table = to_table(study, cells)
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([table.columns, *table.rows])
    return stream.getvalue()


def to_table(study: StudyConfig, cells: Sequence[Cell]) -> Table:
    """A row per arm, task and column: mean, interval, difference to the baseline, its interval, p, p_holm."""
    heads = ("task", "column", "n", "failed", "skipped", "share_at_stop", "mean", "low", "high")
    tests = ("baseline_difference", "difference_low", "difference_high", "p", "p_holm")
    columns = (*study.axes, *heads, *tests)
    rows: list[list[Any]] = []
    for cell in cells:
        # An arm without a single edit keeps its lines: its failures must show.
        for column in dict.fromkeys([*study.columns, *cell.means]):
            mean, change = cell.means.get(column), cell.differences.get(column)
            count = 0 if mean is None else mean.n
            line: list[Any] = [*cell.arm.labels.values(), cell.task, column, count, cell.failed, cell.skipped]
            line.append(f"{cell.at_stop:.4f}" if cell.n else "")
            line += ["", "", ""] if mean is None else [f"{v:.6g}" for v in (mean.mean, mean.low, mean.high)]
            if change is not None:
                line += [f"{v:.6g}" for v in (change.mean, change.low, change.high, change.p, change.p_holm)]
            rows.append(line + [""] * (len(columns) - len(line)))
    return Table(columns, rows)


def to_markdown(study: StudyConfig, cells: Sequence[Cell], columns: Sequence[str]) -> str:
    """A table per task, and per value of the first axis if there are more than two axes."""
    axes = list(study.axes)
    first = axes[0] if len(axes) > 2 else None
    blocks = []
    for task, name in tasks(study).items():
        of_task = [cell for cell in cells if cell.task == task]
        labels = dict.fromkeys(cell.arm.labels[first] for cell in of_task) if first else {"": None}
        for label in labels:
            of_label = [cell for cell in of_task if first is None or cell.arm.labels[first] == label]
            if of_label:
                title = f"**{name}{f', {label}' if label else ''}**"
                shown = [axis for axis in axes if axis != first]
                blocks.append(f"{title}\n\n{_table(of_label, shown, columns, has_stop=study.models is None)}")
    return "\n\n".join(blocks) + "\n"


def _table(cells: Sequence[Cell], axes: Sequence[str], columns: Sequence[str], *, has_stop: bool) -> str:
    shown = [column for column in columns if any(column in cell.means for cell in cells)]
    numbers = ["n", *(["stop"] if has_stop else []), *shown]
    lines = ["| " + " | ".join([*axes, *numbers]) + " |", "|" + "---|" * len(axes) + "--:|" * len(numbers)]
    for cell in cells:
        labels = [cell.arm.labels[axis] for axis in axes]
        stop = f"{cell.means['worst_nll'].mean:.2g}" if "worst_nll" in cell.means else ""
        stop += f" ({cell.at_stop:.0%})" if cell.at_stop < 1 else ""
        figures = [_figure(cell, column) for column in shown]
        lost = [f"{count} {status}" for status, count in ((FAILED, cell.failed), (SKIPPED, cell.skipped)) if count]
        count = str(cell.n) + (f" ({', '.join(lost)})" if lost else "")
        lines.append("| " + " | ".join([*labels, count, *([stop] if has_stop else []), *figures]) + " |")
    return "\n".join(lines)


def _figure(cell: Cell, column: str) -> str:
    """`.830 ±.027 ▲`: mean, half the interval, and the sign of a significant difference to the baseline."""
    mean = cell.means.get(column)
    return "" if mean is None else plus_minus(mean) + sign(cell.differences.get(column))


def correlations(study: StudyConfig, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: Spearman's rho of the column `correlate` with each arm's gain over its baseline, over facts."""
    assert study.correlate is not None
    lines = [f"| rho of {study.correlate} and gain | n | " + " | ".join(study.columns) + " |"]
    lines.append("|---|--:|" + "--:|" * len(study.columns))
    for arm in arms:
        base = baseline_of(study, arm, arms)
        if base is None:
            continue
        before = edited(rows[base.folder])
        pairs = [(before[key], row) for key, row in edited(rows[arm.folder]).items() if key in before]
        figures = [_correlation(pairs, study.correlate, column) for column in study.columns]
        lines.append("| " + " | ".join([arm.name, str(len(pairs)), *figures]) + " |")
    return "\n".join(lines) + "\n"


def _correlation(pairs: Sequence[tuple[Row, Row]], correlate: str, column: str) -> str:
    """`-0.12 (p 0.34)`; empty if the facts do not differ, so that they have no ranks.

    Args:
        pairs: Rows of one record under the baseline and under the arm.
    """
    from scipy import stats

    of_fact: dict[str, list[tuple[float, float]]] = {}
    for old, new in pairs:
        if None not in (new.get(correlate), new.get(column), old.get(column)):
            of_fact.setdefault(fact(new), []).append((new[correlate], new[column] - old[column]))
    # Edits of one fact are not independent, so their means are ranked.
    values, gains = ([fmean(pair[side] for pair in of_one) for of_one in of_fact.values()] for side in (0, 1))
    if len(set(gains)) < 2 or len(set(values)) < 2:
        return ""
    rho, p = stats.spearmanr(values, gains)
    return f"{rho:+.2f} (p {p:.2g})"


def legend(study: StudyConfig) -> str:
    """The meaning of the signs in the Markdown tables."""
    text = "Mean ± half of its 95% interval, clustered by fact."
    if study.models is None:
        text += (
            " `stop`: mean NLL of the least likely answer token where the edit stopped, and the share of edits that "
            "reached the stop if not all did."
        )
    if study.baseline:
        base = ", ".join(study.baseline.values())
        text += (
            f" ▲/▼: above/below *{base}* on the same edits, paired t-test clustered by fact, p < .05 after Holm's "
            "correction over all comparisons of the column and task."
        )
    return text
