"""Results of runs in the terminal, and of several side by side: tables, a picture and a self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.table import Table

from odedit.errors import counted
from odedit.evaluation.statistics import SHOWN, SIGNIFICANT, Estimate, PairedDifference
from odedit.storage.location import Location
from pipeline.report import differences
from pipeline.report.formatting import LABELS, interval, p_value
from pipeline.report.templates import environment
from pipeline.run_folder import reasons
from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace

_COMPARED = (*SHOWN, "seconds")
_COLUMNS = ("edit_id", "fact", "status", *_COMPARED)
# The first two hues stay distinct for colour-blind readers and in greyscale print.
_COLOURS = ("#7b8794", "#0b6bcb", "#d97706", "#7c3aed", "#0f766e")


@dataclass(frozen=True)
class Arm:
    """A finished run under a short name."""

    name: str
    workspace: Workspace
    summary: Mapping[str, Any]

    def rows(self) -> dict[str, results.Row]:
        """Rows of the edited records, by edit id."""
        return differences.edited(results.read_rows(results.parts(self.workspace), _COLUMNS))


@dataclass(frozen=True)
class Block:
    """A table at the head of a comparison.

    Attributes:
        title: Heading of table and page.
        heads: Heads of the columns; the first column names the line, the others are numbers.
        lines: Cells of each line.
        caption: What the numbers are.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str


def block_table(block: Block) -> Table:
    """The block as a table for the terminal."""
    table = Table(title=block.title, title_justify="left", caption=block.caption, caption_justify="left")
    for index, head in enumerate(block.heads):
        table.add_column(head, justify="right" if index else "left")
    for line in block.lines:
        table.add_row(*line)
    return table


def estimates(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    """Mean and interval of every column in a run's summary."""
    return {name: Estimate(**values) for name, values in summary["metrics"].items()}


def summary_table(summary: Mapping[str, Any], title: str) -> Table:
    """The main metrics and the time of one run."""
    table = Table(title=title, title_justify="left", caption=counts(summary), caption_justify="left")
    for name, justify in (("metric", "left"), ("mean [95% interval]", "right"), ("n", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    means = estimates(summary)
    for metric in _COMPARED:
        if metric in means:
            name = "seconds per edit" if metric == "seconds" else f"{metric}  {LABELS[metric]}"
            table.add_row(name, interval(means[metric]), str(means[metric].n))
    return table


def counts(summary: Mapping[str, Any]) -> str:
    return f"{counted(summary['n'], 'edit')}, {summary['failed']} failed, {summary['skipped']} skipped"


def comparison_table(first: Arm, second: Arm) -> Table:
    """Two runs side by side, with a paired t-test of each metric."""
    a, b = first.rows(), second.rows()
    table = Table(
        title=f"{first.name} against {second.name}: {counted(len(a.keys() & b.keys()), 'edit')} that both have",
        title_justify="left",
        caption="Mean \u00b1 half its 95% interval; difference = second - first\non the same edits; p: paired t-test.",
        caption_justify="left",
    )
    table.add_column("metric")
    for name in (first.name, second.name, "difference", "p", "n"):
        table.add_column(name, justify="right")
    for entry in differences.compare(a, b, _COMPARED):
        name = entry.column if entry.column in SHOWN else "seconds per edit"
        cells = [_plus_minus(entry.first), _plus_minus(entry.second), _plus_minus(entry.difference, "+")]
        p = _tested(entry)
        style = "bold" if p is not None and p < SIGNIFICANT else None
        table.add_row(name, *cells, p_value(p), str(entry.difference.n), style=style)
    return table


def _plus_minus(value: Estimate | PairedDifference, sign: str = "") -> str:
    """`0.913 ± 0.033`: a mean and half its interval, narrow enough for a terminal."""
    return f"{value.mean:{sign}.3f} \u00b1 {(value.high - value.low) / 2:.3f}"


def _tested(entry: differences.Comparison) -> float | None:
    """p of a metric; time depends on the machine's load and is not tested."""
    return entry.difference.p if entry.column in SHOWN else None


def draw(arms: Sequence[Arm]) -> bytes:
    """A PNG: the mean of each metric with its 95% interval, one bar per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [metric for metric in SHOWN if any(metric in arm.summary["metrics"] for arm in arms)]
    picture = Figure(figsize=(max(8.6, 0.32 * len(arms) * len(shown)), 3.8), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    width = 0.8 / len(arms)
    turned = 90 if len(arms) > 2 else 0
    for index, arm in enumerate(arms):
        means = estimates(arm.summary)
        for position, metric in enumerate(shown):
            if metric not in means:
                continue
            value = means[metric]
            x = position + (index - (len(arms) - 1) / 2) * width
            # An interval of shares may reach beyond 0 and 1.
            low, high = max(value.low, 0.0), min(value.high, 1.0)
            label = f"{arm.name} (n = {arm.summary['n']})" if position == 0 else None
            axes.bar(x, value.mean, width * 0.92, color=_COLOURS[index % len(_COLOURS)], label=label, zorder=2)
            error = [[max(value.mean - low, 0.0)], [max(high - value.mean, 0.0)]]
            axes.errorbar(x, value.mean, yerr=error, fmt="none", ecolor="#1f2933", elinewidth=1.2, capsize=3, zorder=3)
            text = f"{value.mean:.3f}"
            axes.text(x, 0.02, text, ha="center", va="bottom", fontsize=8, color="white", rotation=turned, zorder=4)
    names = ["\n".join((metric, *LABELS[metric].split(", "))) for metric in shown]
    axes.set_xticks(range(len(shown)), names, fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("mean, 95% interval")
    axes.grid(axis="y", color="#e4e7eb", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    # Bars near 1 leave no room for a legend inside.
    if axes.containers:
        picture.legend(loc="outside upper center", ncols=len(arms), frameon=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def write_comparison(
    folder: Location,
    arms: Sequence[Arm],
    others: Mapping[str, Workspace] = MappingProxyType({}),
    block: Block | None = None,
) -> Location:
    """Writes `comparison.png` and `report.html` of several runs against the first; returns the page.

    Args:
        others: Further runs by name, whose reports the page links to before the compared ones.
        block: Table at the head of the page, about the further runs.
    """
    from markupsafe import Markup

    (folder / "comparison.png").write_bytes(draw(arms))
    path, templates = folder / "report.html", environment()
    runs = dict(others) | {arm.name: arm.workspace for arm in arms}
    text = templates.get_template("comparison.html.j2").render(
        title=block.title if block is not None else " against ".join(arm.name for arm in arms),
        block=block,
        pages={name: link for name, run in runs.items() if (link := _link(run, folder)) is not None},
        columns=_columns(arms),
        arms=[_arm_view(arm) for arm in arms],
        style=Markup(templates.get_template("report.css").render()),
    )
    path.write_text(text)
    return path


def _columns(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Every compared column with its mean in each run, and the difference to the first run."""
    first = arms[0].rows()
    compared: list[dict[str, differences.Comparison]] = [{}]
    for arm in arms[1:]:
        compared.append({entry.column: entry for entry in differences.compare(first, arm.rows(), _COMPARED)})
    means = [estimates(arm.summary) for arm in arms]
    columns = []
    for column in _COMPARED:
        lines = []
        for arm, of_arm, entries in zip(arms, means, compared, strict=True):
            if column in of_arm:
                entry = entries.get(column)
                p = None if entry is None else _tested(entry)
                lines.append({"name": arm.name, "mean": of_arm[column], "entry": entry, "p": p,
                              "is_clear": p is not None and p < SIGNIFICANT})  # fmt: skip
        if lines:
            is_share = column in SHOWN
            label = LABELS[column] if is_share else "seconds per edit"
            columns.append({"name": column, "label": label, "is_share": is_share, "lines": lines})
    return columns


def _arm_view(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "counts": counts(arm.summary),
        "stop_reasons": ", ".join(f"{name} {count}" for name, count in arm.summary["stop_reasons"].items()),
        "reasons": reasons.sentences(arm.summary.get("reasons", [])),
        "config": arm.workspace.config.read_text() if arm.workspace.config.exists() else "",
    }


def _link(workspace: Workspace, folder: Location) -> str | None:
    """A run's report as a page in the folder links to it; None if the run is elsewhere."""
    out = workspace.out
    return f"{out.name}/{workspace.report.name}" if str(out.parent) == str(folder) else None
