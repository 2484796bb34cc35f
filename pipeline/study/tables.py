"""From result rows to what a study says: means, differences to a baseline, tests, as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from odedit.evaluation.statistics import Estimate, PairedDifference, holm, paired, summarize
from pipeline.report.formatting import plus_minus, sign
from pipeline.run_folder.rows import EDITED, Row
from pipeline.study.spec import Arm, StudyConfig

TASKS = {"vqa": "E-VQA", "caption": "E-IC"}
_ALWAYS = ("worst_nll", "steps", "seconds")


@dataclass(frozen=True)
class Cell:
    """One arm on one task.

    Attributes:
        arm: The arm.
        task: `vqa` or `caption`.
        n, failed, skipped: Records that were edited, and that were not.
        at_stop: Share of the edits that reached the stop and not the bound on steps.
        means: Column to estimate.
        differences: Column to the arm's value minus its baseline's, on the edits that both have; empty for a baseline.
        p_holm: Column to p after Holm's correction for all comparisons of that column and task in the study.
    """

    arm: Arm
    task: str
    n: int
    failed: int
    skipped: int
    at_stop: float
    means: dict[str, Estimate]
    differences: dict[str, PairedDifference]
    p_holm: dict[str, float]


def cells(study: StudyConfig, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> list[Cell]:
    """Every arm on every task that has records.

    Args:
        rows: All result rows, by the arm's folder.
    """
    columns = tuple(dict.fromkeys((*study.columns, *study.further, *study.plot.columns)))
    made: list[Cell] = []
    for task in TASKS:
        edited = {
            name: {row["edit_id"]: row for row in found if row["status"] == EDITED and row["task"] == task}
            for name, found in rows.items()
        }
        comparisons = {
            arm.folder: paired(edited[base.folder], edited[arm.folder], columns)
            for arm in arms
            if (base := baseline_of(study, arm, arms)) is not None
        }
        corrected = {
            column: holm({a: c[column].p for a, c in comparisons.items() if column in c}) for column in columns
        }
        for arm in arms:
            mine = list(edited[arm.folder].values())
            others = [row for row in rows[arm.folder] if row["task"] == task]
            if not others:
                continue
            facts = [str(row.get("fact") or row["edit_id"]) for row in mine]
            found = summarize([{c: row.get(c) for c in (*columns, *_ALWAYS)} for row in mine], facts)
            made.append(
                Cell(
                    arm=arm,
                    task=task,
                    n=len(mine),
                    failed=sum(row["status"] == "failed" for row in others),
                    skipped=sum(row["status"] == "skipped" for row in others),
                    at_stop=sum(row["stop_reason"] != "max_steps" for row in mine) / max(len(mine), 1),
                    means=found,
                    differences=comparisons.get(arm.folder, {}),
                    p_holm={c: corrected[c][arm.folder] for c in columns if arm.folder in corrected[c]},
                )
            )
    return made


def baseline_of(study: StudyConfig, arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm with the baseline's labels and otherwise this arm's own; None for the baseline itself, or without one."""
    wanted = {**arm.labels, **study.baseline}
    if not study.baseline or wanted == arm.labels:
        return None
    return next((other for other in arms if other.labels == wanted), None)


def to_csv(study: StudyConfig, found: Sequence[Cell]) -> str:
    """One line per arm, task and column: mean, interval, difference to the baseline, interval, p, corrected p."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    heads = ("task", "column", "n", "failed", "skipped", "share_at_stop", "mean", "low", "high")
    tests = ("baseline_difference", "difference_low", "difference_high", "p", "p_holm")
    writer.writerow([*study.axes, *heads, *tests])
    for cell in found:
        # What an arm lacks has a line too: without edits that worked it would be gone without a trace.
        for column in dict.fromkeys([*study.columns, *cell.means]):
            mean, change = cell.means.get(column), cell.differences.get(column)
            count = 0 if mean is None else mean.n
            line: list[Any] = [*cell.arm.labels.values(), cell.task, column, count, cell.failed, cell.skipped]
            line.append(f"{cell.at_stop:.4f}" if cell.n else "")
            line += ["", "", ""] if mean is None else [f"{v:.6g}" for v in (mean.mean, mean.low, mean.high)]
            if change is not None:
                values = (change.mean, change.low, change.high, change.p, cell.p_holm.get(column, math.nan))
                line += [f"{value:.6g}" for value in values]
            writer.writerow(line + [""] * (len(study.axes) + len(heads) + len(tests) - len(line)))
    return stream.getvalue()


def to_markdown(study: StudyConfig, found: Sequence[Cell], columns: Sequence[str]) -> str:
    """A table per task and per value of the first axis where there are several axes."""
    axes = list(study.axes)
    first = axes[0] if len(axes) > 2 else None
    blocks = []
    for task, name in TASKS.items():
        of_task = [cell for cell in found if cell.task == task]
        labels = dict.fromkeys(cell.arm.labels[first] for cell in of_task) if first else {"": None}
        for label in labels:
            mine = [cell for cell in of_task if first is None or cell.arm.labels[first] == label]
            if mine:
                title = f"**{name}{f', {label}' if label else ''}**"
                blocks.append(f"{title}\n\n{_block(mine, [a for a in axes if a != first], columns)}")
    return "\n\n".join(blocks) + "\n"


def _block(found: Sequence[Cell], axes: Sequence[str], columns: Sequence[str]) -> str:
    shown = [column for column in columns if any(column in cell.means for cell in found)]
    lines = [
        "| " + " | ".join([*axes, "n", "stop", *shown]) + " |",
        "|" + "---|" * len(axes) + "--:|" * (len(shown) + 2),
    ]
    for cell in found:
        labels = [cell.arm.labels[axis] for axis in axes]
        stop = f"{cell.means['worst_nll'].mean:.2g}" if "worst_nll" in cell.means else ""
        stop += f" ({cell.at_stop:.0%})" if cell.at_stop < 1 else ""
        values = [_figure(cell, column) for column in shown]
        lost = [f"{count} {what}" for what, count in (("failed", cell.failed), ("skipped", cell.skipped)) if count]
        count = str(cell.n) + (f" ({', '.join(lost)})" if lost else "")
        lines.append("| " + " | ".join([*labels, count, stop, *values]) + " |")
    return "\n".join(lines)


def _figure(cell: Cell, column: str) -> str:
    """`.830 ±.027 ▲`: mean, half the interval, and whether it differs from the baseline after correction."""
    found = cell.means.get(column)
    if found is None:
        return ""
    return plus_minus(found) + sign(cell.differences.get(column), cell.p_holm.get(column, math.nan))


def correlations(study: StudyConfig, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: Spearman's rho of the column `correlate` with the gain of each arm over its baseline, fact by fact."""
    from scipy import stats

    assert study.correlate is not None
    lines = [f"| rho of {study.correlate} and gain | n | " + " | ".join(study.columns) + " |"]
    lines.append("|---|--:|" + "--:|" * len(study.columns))
    for arm in arms:
        base = baseline_of(study, arm, arms)
        if base is None:
            continue
        before = {row["edit_id"]: row for row in rows[base.folder] if row["status"] == EDITED}
        mine = [row for row in rows[arm.folder] if row["status"] == EDITED and row["edit_id"] in before]
        values = []
        for column in study.columns:
            of_fact: dict[str, list[tuple[float, float]]] = {}
            for row in mine:
                old = before[row["edit_id"]]
                if None not in (row.get(study.correlate), row.get(column), old.get(column)):
                    pair = (row[study.correlate], row[column] - old[column])
                    of_fact.setdefault(str(row.get("fact") or row["edit_id"]), []).append(pair)
            # Edits of one fact are not independent: their means are what is ranked.
            distance, gains = ([fmean(pair[side] for pair in pairs) for pairs in of_fact.values()] for side in (0, 1))
            if len(set(gains)) < 2 or len(set(distance)) < 2:
                values.append("")  # without spread there is nothing to rank
                continue
            rho, p = stats.spearmanr(distance, gains)
            values.append(f"{rho:+.2f} (p {p:.2g})")
        lines.append("| " + " | ".join([arm.name, str(len(mine)), *values]) + " |")
    return "\n".join(lines) + "\n"


def legend(study: StudyConfig) -> str:
    """What the Markdown tables' signs mean."""
    text = (
        "Mean ± half of its 95% interval, clustered by fact. `stop`: mean NLL of the worst answer token where the edit "
        "stopped, and the share of edits that reached the stop if not all did."
    )
    if study.baseline:
        base = ", ".join(study.baseline.values())
        text += (
            f" ▲/▼: above/below *{base}* on the same edits, paired t-test clustered by fact, p < .05 after Holm's "
            "correction over all comparisons of the column and task."
        )
    return text
