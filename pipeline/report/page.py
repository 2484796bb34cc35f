"""Results for people: tables on the terminal, a picture, and one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.table import Table

from odedit.errors import counted
from odedit.evaluation.columns import METRICS
from odedit.evaluation.statistics import MAIN, PairedDifference, paired, summarize
from odedit.storage.location import Location
from pipeline.run_folder import reasons
from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace

LABELS = {name: metric.label for name, metric in METRICS.items()}
_COLUMNS = (
    "edit_id",
    "fact",
    "status",
    "error",
    "prompt",
    "target",
    "answer_before",
    "answer_after",
    *MAIN,
    "seconds",
    "stop_reason",
)
_MAX_PROBLEMS, _MAX_EDITS = 100, 20
# Two hues that stay apart for colour-blind readers and in print, then further ones for further arms.
_COLOURS = ("#7b8794", "#0b6bcb", "#d97706", "#7c3aed")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a finished run under a short name."""

    name: str
    workspace: Workspace
    summary: Mapping[str, Any]

    def rows(self) -> dict[str, results.Row]:
        """Rows of the edits that worked, by edit id."""
        every = results.read_rows(results.parts(self.workspace), _COLUMNS)
        return {row["edit_id"]: row for row in every if row["status"] == results.EDITED}


def figure(values: Mapping[str, Any], digits: int = 3) -> str:
    """`0.913 [0.880, 0.946]`: a mean and its interval."""
    return f"{values['mean']:.{digits}f} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]"


def summary_table(summary: Mapping[str, Any], title: str) -> Table:
    """The five metrics of one run."""
    table = Table(title=title, title_justify="left", caption=counts(summary), caption_justify="left")
    for name, justify in (("metric", "left"), ("mean [95% interval]", "right"), ("n", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for metric in (*MAIN, "seconds"):
        values = summary["metrics"].get(metric)
        if values is not None:
            name = "seconds per edit" if metric == "seconds" else f"{metric}  {LABELS[metric]}"
            table.add_row(name, figure(values), str(values["n"]))
    return table


def counts(summary: Mapping[str, Any]) -> str:
    return f"{counted(summary['n'], 'edit')}, {summary['failed']} failed, {summary['skipped']} skipped"


def compare(first: Arm, second: Arm) -> tuple[list[dict[str, Any]], int]:
    """Second minus first, over the edits that both have: one entry per metric and one for seconds, and their number."""
    a, b = first.rows(), second.rows()
    shared = sorted(a.keys() & b.keys())
    differences: dict[str, PairedDifference] = paired(a, b, (*MAIN, "seconds"))
    entries = []
    for metric in (*MAIN, "seconds"):
        both = [key for key in shared if a[key].get(metric) is not None and b[key].get(metric) is not None]
        if not both:
            continue
        facts = [str(a[key].get("fact") or key) for key in both]
        sides = [summarize([{metric: arm[key][metric]} for key in both], facts)[metric] for arm in (a, b)]
        found = differences[metric]
        entries.append({
            "metric": metric,
            "label": LABELS.get(metric, "seconds per edit"),
            "first": vars(sides[0]),
            "second": vars(sides[1]),
            "difference": {"mean": found.mean, "low": found.low, "high": found.high},
            "p": found.p if metric in MAIN else None,
            "n": found.n,
        })  # fmt: skip
    return entries, len(shared)


def comparison_table(first: Arm, second: Arm) -> Table:
    """Two runs side by side, with a paired t-test of each metric."""
    entries, shared = compare(first, second)
    table = Table(
        title=f"{first.name} against {second.name}: {counted(shared, 'edit')} that both have",
        title_justify="left",
        caption="Mean \u00b1 half its 95% interval; difference = second - first\non the same edits; p: paired t-test.",
        caption_justify="left",
    )
    table.add_column("metric")
    for name in (first.name, second.name, "difference", "p", "n"):
        table.add_column(name, justify="right")
    for entry in entries:
        row = [_plus_minus(entry["first"]), _plus_minus(entry["second"]), _plus_minus(entry["difference"], "+")]
        name = entry["label"] if entry["metric"] == "seconds" else entry["metric"]
        table.add_row(name, *row, p_value(entry["p"]), str(entry["n"]), style="bold" if _is_clear(entry) else None)
    return table


def _plus_minus(values: Mapping[str, float], sign: str = "") -> str:
    """`0.913 ± 0.033`: a mean and half its interval, narrow enough for a terminal."""
    return f"{values['mean']:{sign}.3f} \u00b1 {(values['high'] - values['low']) / 2:.3f}"


def _signed(values: Mapping[str, float]) -> str:
    return f"{values['mean']:+.3f} [{values['low']:+.3f}, {values['high']:+.3f}]"


def p_value(p: float | None) -> str:
    if p is None or p != p:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _is_clear(entry: Mapping[str, Any]) -> bool:
    return entry["metric"] != "seconds" and entry["p"] is not None and entry["p"] < 0.05


def draw(arms: Sequence[Arm]) -> bytes:
    """A PNG: each metric's mean with its 95% interval, one bar per arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8.6, 3.8), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        for place, metric in enumerate(MAIN):
            values = arm.summary["metrics"].get(metric)
            if values is None:
                continue
            x = place + (index - (len(arms) - 1) / 2) * width
            mean = values["mean"]
            # The interval of a share may reach beyond 1, which means nothing.
            low, high = max(values["low"], 0.0), min(values["high"], 1.0)
            label = f"{arm.name} (n = {arm.summary['n']})" if place == 0 else None
            axes.bar(x, mean, width * 0.92, color=_COLOURS[index % len(_COLOURS)], label=label, zorder=2)
            error = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
            axes.errorbar(x, mean, yerr=error, fmt="none", ecolor="#1f2933", elinewidth=1.2, capsize=3, zorder=3)
            axes.text(x, 0.02, f"{mean:.3f}", ha="center", va="bottom", fontsize=8, color="white", zorder=4)
    axes.set_xticks(range(len(MAIN)), [f"{metric}\n{LABELS[metric]}" for metric in MAIN])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("mean, 95% interval")
    axes.grid(axis="y", color="#e4e7eb", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    # Outside, because bars near 1 leave no room inside.
    if axes.containers:
        picture.legend(loc="outside upper center", ncols=len(arms), frameon=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def write_run_report(workspace: Workspace, summary: Mapping[str, Any]) -> Location:
    """`report.html` of one run."""
    arm = Arm(f"{summary['editor']}, {summary['objective']} objective", workspace, summary)
    return _write(workspace.report, [arm])


def write_comparison(folder: Location, arms: Sequence[Arm]) -> Location:
    """`comparison.png` and `report.html` of several runs, the first one the baseline."""
    (folder / "comparison.png").write_bytes(draw(arms))
    return _write(folder / "report.html", arms)


def _write(path: Location, arms: Sequence[Arm]) -> Location:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"figure": figure, "signed": _signed, "p_value": p_value}
    comparisons = [
        {"first": arms[0], "second": arm, "entries": entries, "shared": shared}
        for arm in arms[1:]
        for entries, shared in [compare(arms[0], arm)]
    ]
    text = environment.get_template("report.html.j2").render(
        title=" against ".join(arm.name for arm in arms),
        arms=[_arm_view(arm) for arm in arms],
        comparisons=comparisons,
        metrics=MAIN,
        labels=LABELS,
        image=base64.b64encode(draw(arms)).decode(),
    )
    path.write_text(text)
    return path


def _arm_view(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "summary": arm.summary,
        "counts": counts(arm.summary),
        "stop_reasons": ", ".join(f"{name} {count}" for name, count in arm.summary["stop_reasons"].items()),
        "reasons": reasons.sentences(arm.summary.get("reasons", [])),
        "edits": _first_rows(arm, _MAX_EDITS, results.EDITED),
        "problems": _first_rows(arm, _MAX_PROBLEMS, results.FAILED, results.SKIPPED),
        "config": arm.workspace.config.read_text() if arm.workspace.config.exists() else "",
    }


def _first_rows(arm: Arm, count: int, *statuses: str) -> list[results.Row]:
    found = islice(results.read_rows(results.parts(arm.workspace), _COLUMNS, statuses), count)
    return [{name: row.get(name) for name in _COLUMNS} for row in found]
