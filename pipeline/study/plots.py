"""Pictures of studies: points with intervals, lines and heat maps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Literal

from odedit.evaluation.statistics import Estimate
from pipeline.report.formatting import LABELS, number
from pipeline.study.fronts import front
from pipeline.study.spec import StudyConfig
from pipeline.study.tables import Cell, tasks

# Palette of Okabe and Ito (2008), distinct for colour-blind readers, without its yellow, which is too pale for points.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^Dvp*XP"
_NAMES = LABELS | {
    "rel_generated_exact": "edits that hold",
    "m_gen_exact": "image generality, whole answers",
    "m_gen_generated_exact": "image generality, whole generated answers",
    "tm_gen": "text and image generality",
    "m_loc_near_whole": "image locality, near, whole answers",
    "kept": "other answers kept",
    "peak_bytes": "peak memory per edit, bytes",
    "seconds": "seconds per edit",
}


def draw(study: StudyConfig, cells: Sequence[Cell]) -> bytes:
    """A PNG of kind `study.plot.kind`, other than `states`."""
    painters = {"dots": _dots, "lines": _lines, "bands": _bands, "heatmap": _heatmap, "fronts": _fronts}
    return to_png(painters[study.plot.kind](study, cells))


def to_png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def _panels(study: StudyConfig, cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of each row of panels, by the row's name: one row per task and label of the axes that are not drawn."""
    drawn = {study.plot.x, study.plot.y, study.plot.colour}
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        labels = [label for axis, label in cell.arm.labels.items() if axis not in drawn]
        rows.setdefault("\n".join([*labels, tasks(study)[cell.task]]), []).append(cell)
    return rows


def _columns(study: StudyConfig, cells: Sequence[Cell]) -> list[str]:
    return [column for column in study.plot.columns if any(column in cell.means for cell in cells)]


def _dots(study: StudyConfig, cells: Sequence[Cell]) -> Any:
    panels, columns = _panels(study, cells), _columns(study, cells)
    y_axis = study.plot.y or next(iter(study.axes))
    colour = study.plot.colour
    groups = list(study.axes[y_axis])
    colours = _colours(study)
    size = max(1, len(colours))
    height = sum(0.9 + 0.17 * size * len({c.arm.labels[y_axis] for c in of_row}) for of_row in panels.values())
    picture = figure(2.5 * len(columns) + 1.5, height + 0.6)
    grid = picture.subplots(len(panels), len(columns), squeeze=False, sharey="row", sharex="col")
    for row, (name, of_row) in enumerate(panels.items()):
        present = [group for group in groups if any(cell.arm.labels[y_axis] == group for cell in of_row)]
        for col, column in enumerate(columns):
            axes = grid[row][col]
            for cell in of_row:
                mean = cell.means.get(column)
                if mean is None:
                    continue
                label = cell.arm.labels[colour] if colour else ""
                offset = (list(colours).index(label) - (size - 1) / 2) * 0.8 / size if colour else 0.0
                y = present.index(cell.arm.labels[y_axis]) + offset
                _point(axes, mean, y, colours.get(label, COLOURS[0]))
            axes.set_yticks(range(len(present)), present)
            axes.set_ylim(len(present) - 0.4, -0.6)
            axes.grid(axis="x", color="#e4e7eb", zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(_NAMES.get(column, column), fontsize=9)
            axes.tick_params(labelsize=8)
        grid[row][0].set_ylabel(name, fontsize=8)
    for axes, column in zip(grid[0], columns, strict=True):  # the rows share their x axes
        low, high = axes.get_xlim()
        axes.set_xlim(low, _end(low, high, column, cells))
    _legend(picture, colours)
    return picture


def _end(low: float, high: float, column: str, cells: Sequence[Cell]) -> float:
    """Upper end of a column's axis: just above 1 for shares, which have no larger values."""
    shown = [cell.means[column] for cell in cells if column in cell.means]
    are_shares = all(mean.low >= 0.0 and mean.high <= 1.0 for mean in shown)
    return min(high, 1.0 + 0.04 * (1.0 - low)) if are_shares and low < 1.0 else high


def _point(axes: Any, mean: Estimate, y: float, colour: str) -> None:
    error = [[mean.mean - mean.low], [mean.high - mean.mean]]
    axes.errorbar(mean.mean, y, xerr=error, fmt="o", color=colour, markersize=4, elinewidth=1.4, capsize=2, zorder=3)


def _cross(axes: Any, x: Estimate, y: Estimate, **style: Any) -> None:
    """A point with its intervals in both directions."""
    errors = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
    axes.errorbar(x.mean, y.mean, **errors, **style)


def _colours(study: StudyConfig) -> dict[str, str]:
    if study.plot.colour is None:
        return {}
    labels = list(study.axes[study.plot.colour])
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def _legend(picture: Any, colours: dict[str, str], markers: str = "o", line: Literal["-", "none"] = "none") -> None:
    from matplotlib.lines import Line2D

    if colours:
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle=line)
            for colour, marker in zip(colours.values(), cycle(markers), strict=False)
        ]
        picture.legend(handles, list(colours), loc="outside upper center", ncols=min(len(colours), 4), frameon=False)


def _lines(study: StudyConfig, cells: Sequence[Cell]) -> Any:
    """Means over the labels of axis `x`; the label `reference` is a horizontal line."""
    panels, columns = _panels(study, cells), _columns(study, cells)
    x_axis, reference = study.plot.x or next(iter(study.axes)), study.plot.reference
    labels = [label for label in study.axes[x_axis] if label != reference]
    colours = _colours(study) or {"": COLOURS[0]}
    picture = figure(2.6 * len(columns) + 0.6, 2.4 * len(panels) + 0.5)
    grid = picture.subplots(len(panels), len(columns), squeeze=False)
    for row, (name, of_row) in enumerate(panels.items()):
        for col, column in enumerate(columns):
            axes = grid[row][col]
            for shade, colour in colours.items():
                points = {
                    cell.arm.labels[x_axis]: cell.means[column]
                    for cell in of_row
                    if column in cell.means and (not shade or cell.arm.labels.get(study.plot.colour or "") == shade)
                }
                shown = [(i, points[label]) for i, label in enumerate(labels) if label in points]
                errors = [[e.mean - e.low for _, e in shown], [e.high - e.mean for _, e in shown]]
                means = [e.mean for _, e in shown]
                axes.errorbar(
                    [i for i, _ in shown], means, yerr=errors, fmt="o-", color=colour, markersize=4, capsize=2
                )
                if reference in points:
                    level = points[reference]
                    axes.axhline(level.mean, color="#009E73", linestyle="--", label=reference)
                    axes.axhspan(level.low, level.high, color="#009E73", alpha=0.12)
            low, high = axes.get_ylim()
            axes.set_ylim(low, _end(low, high, column, of_row))
            axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=30 if len(labels) > 4 else 0)
            axes.grid(axis="y", color="#e4e7eb")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", labelsize=8)
            if row == 0:
                axes.set_title(_NAMES.get(column, column), fontsize=9)
            if row == len(panels) - 1:
                axes.set_xlabel(x_axis, fontsize=8)
            if reference and col == 0 and row == 0:
                axes.legend(fontsize=7, frameon=False)
        grid[row][0].set_ylabel(name, fontsize=8)
    _legend(picture, _colours(study))
    return picture


def _bands(study: StudyConfig, cells: Sequence[Cell]) -> Any:
    """Means over axis `x`, whose labels are numbers, with their intervals as bands, and the front of two columns."""
    panels, columns, of_front = _panels(study, cells), _columns(study, cells), study.plot.front
    x_axis, colours = study.plot.x or next(iter(study.axes)), _colours(study) or {"": COLOURS[0]}
    widths = [1.0] * len(columns) + ([1.3] if of_front else [])
    picture = figure(2.6 * sum(widths) + 0.6, 2.7 * len(panels) + 0.5)
    grid = picture.subplots(len(panels), len(widths), squeeze=False, width_ratios=widths)
    for row, (name, of_row) in enumerate(panels.items()):
        lines: dict[str, list[Cell]] = {shade: [] for shade in colours}
        for cell in sorted(of_row, key=lambda cell: _x(cell, x_axis)):
            lines[cell.arm.labels.get(study.plot.colour or "", "")].append(cell)
        for axes, column in zip(grid[row], columns, strict=False):
            _curves(axes, column, lines, colours, x_axis)
        if of_front:
            _front(grid[row][-1], of_front, lines, colours, x_axis)
            low, high = grid[row][-1].get_xlim()
            grid[row][-1].set_xlim(low, _end(low, high, of_front[0], of_row))
        for axes, column in zip(grid[row], [*columns, *of_front[1:]], strict=True):
            low, high = axes.get_ylim()
            axes.set_ylim(low, _end(low, high, column, of_row))
            axes.grid(color="#e4e7eb", zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
        grid[row][0].set_ylabel(name, fontsize=8)
    _legend(picture, _colours(study), _MARKERS, "-")
    return picture


def _x(cell: Cell, axis: str) -> float:
    return float(cell.arm.labels[axis])


def _curves(
    axes: Any, column: str, lines: Mapping[str, Sequence[Cell]], colours: Mapping[str, str], x_axis: str
) -> None:
    """A line with its band for every colour, over a logarithmic axis."""
    for (shade, colour), marker in zip(colours.items(), cycle(_MARKERS), strict=False):
        shown = [cell for cell in lines[shade] if column in cell.means]
        x, means = [_x(cell, x_axis) for cell in shown], [cell.means[column] for cell in shown]
        axes.plot(x, [e.mean for e in means], marker=marker, color=colour, markersize=4, clip_on=False, zorder=3)
        axes.fill_between(x, [e.low for e in means], [e.high for e in means], color=colour, alpha=0.15, lw=0)
    ticks = sorted({_x(cell, x_axis) for line in lines.values() for cell in line})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(x_axis, fontsize=8)
    axes.set_title(_NAMES.get(column, column), fontsize=9)


def _front(
    axes: Any, columns: Sequence[str], lines: Mapping[str, Sequence[Cell]], colours: Mapping[str, str], x_axis: str
) -> None:
    """The second column against the first at the last label of axis `x`, with the front as a line.

    Points that others dominate, with less than half of the best in a column, are named at the edge instead: they would
    push the others together.
    """
    last = max((_x(cell, x_axis) for line in lines.values() for cell in line), default=0.0)
    points: dict[str, tuple[Estimate, Estimate]] = {}
    for shade, line in lines.items():
        for cell in line:
            if _x(cell, x_axis) == last and set(columns) <= cell.means.keys():
                points[shade] = cell.means[columns[0]], cell.means[columns[1]]
    means = {shade: (x.mean, y.mean) for shade, (x, y) in points.items()}
    vertices = front(list(means.values()))
    best = [max((mean[axis] for mean in vertices), default=0.0) for axis in (0, 1)]
    is_far = {
        shade: mean not in vertices and any(mean[axis] < best[axis] / 2 for axis in (0, 1))
        for shade, mean in means.items()
    }
    for (shade, colour), marker in zip(colours.items(), cycle(_MARKERS), strict=False):
        if shade in points and not is_far[shade]:
            _cross(axes, *points[shade], fmt=marker, color=colour, markersize=5, elinewidth=0.7, zorder=3)
    axes.plot(*zip(*vertices, strict=True), color="#52606d", linewidth=1, linestyle=":", zorder=2)
    far = [f"{shade} ({x:.2f}, {y:.2f})" for shade, (x, y) in means.items() if is_far[shade]]
    if far:
        text = "\n".join(["outside:", *far])
        axes.text(0.02, 0.02, text, transform=axes.transAxes, fontsize=7, color="#52606d", va="bottom")
    axes.set_xlabel(_NAMES.get(columns[0], columns[0]), fontsize=8)
    axes.set_ylabel(_NAMES.get(columns[1], columns[1]), fontsize=8)
    axes.set_title(f"front at {last:g} {x_axis}", fontsize=9)


def _fronts(study: StudyConfig, cells: Sequence[Cell]) -> Any:
    """Generality against near locality: every arm as a point with its intervals, and each label's front as a line."""
    chosen = study.fronts
    assert chosen is not None, "checked with the study"
    apart = [axis for axis in study.axes if axis != chosen.of and axis not in chosen.over]
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault("\n".join([*(cell.arm.labels[axis] for axis in apart), tasks(study)[cell.task]]), []).append(
            cell
        )
    picture = figure(3.6 * len(chosen.columns) + 0.6, 3.0 * len(rows) + 0.7)
    grid = picture.subplots(len(rows), len(chosen.columns), squeeze=False)
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(study.axes[chosen.of])}
    for row, (name, of_row) in enumerate(rows.items()):
        for axes, column in zip(grid[row], chosen.columns, strict=True):
            for (label, colour), marker in zip(colours.items(), cycle(_MARKERS), strict=False):
                own = [cell.means for cell in of_row if cell.arm.labels[chosen.of] == label]
                _one_front(
                    axes,
                    [means for means in own if {chosen.near, column} <= means.keys()],
                    chosen.near,
                    column,
                    colour,
                    marker,
                )
            axes.set_xlabel(_NAMES.get(chosen.near, chosen.near), fontsize=8)
            axes.set_title(_NAMES.get(column, column), fontsize=9)
            axes.grid(color="#e4e7eb", zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
        grid[row][0].set_ylabel(name, fontsize=8)
    _legend(picture, colours, _MARKERS, "-")
    return picture


def _one_front(
    axes: Any, points: Sequence[Mapping[str, Estimate]], near: str, column: str, colour: str, marker: str
) -> None:
    if not points:
        return
    for means in points:
        _cross(axes, means[near], means[column], fmt=marker, color=colour, markersize=4, elinewidth=0.6, alpha=0.7)
    xs, ys = zip(*front([(means[near].mean, means[column].mean) for means in points]), strict=True)
    axes.plot(xs, ys, color=colour, linewidth=1.2)


def _heatmap(study: StudyConfig, cells: Sequence[Cell]) -> Any:
    panels, columns = _panels(study, cells), _columns(study, cells)
    assert study.plot.x is not None and study.plot.y is not None
    x_labels, y_labels = list(study.axes[study.plot.x]), list(study.axes[study.plot.y])
    picture = figure(2.5 * len(columns) + 0.8, 2.4 * len(panels) + 0.4)
    grid = picture.subplots(len(panels), len(columns), squeeze=False)
    for row, (name, of_row) in enumerate(panels.items()):
        by_labels = {(cell.arm.labels[study.plot.y], cell.arm.labels[study.plot.x]): cell for cell in of_row}
        for col, column in enumerate(columns):
            axes = grid[row][col]
            values = [[_mean(by_labels.get((y, x)), column) for x in x_labels] for y in y_labels]
            known = [value for line in values for value in line if value == value]
            # The colours span at least two points of share; less would make noise look like an effect.
            middle, half = (max(known) + min(known)) / 2, max((max(known) - min(known)) / 2, 0.01)
            axes.imshow(values, cmap="cividis", vmin=middle - half, vmax=middle + half, aspect="auto")
            for i, line in enumerate(values):
                for j, value in enumerate(line):
                    shade = "black" if value > middle else "white"
                    axes.text(j, i, number(value), ha="center", va="center", fontsize=8, color=shade)
            axes.set_xticks(range(len(x_labels)), x_labels, fontsize=8)
            axes.set_yticks(range(len(y_labels)), y_labels if col == 0 else [""] * len(y_labels), fontsize=8)
            if row == 0:
                axes.set_title(_NAMES.get(column, column), fontsize=9)
            if row == len(panels) - 1:
                axes.set_xlabel(study.plot.x, fontsize=8)
        grid[row][0].set_ylabel(f"{name}\n{study.plot.y}", fontsize=8)
    return picture


def _mean(cell: Cell | None, column: str) -> float:
    return cell.means[column].mean if cell is not None and column in cell.means else float("nan")
