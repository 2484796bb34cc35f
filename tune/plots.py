"""Pictures of a search: history, parallel coordinates, importance, and the Pareto front of several objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from pipeline.study.plots import COLOURS, figure, to_png
from tune.config import SCORE, Search
from tune.dimensions import Parameter, label
from tune.importance import Share, Spread
from tune.points import COMPLETE, FAILED, PRUNED, Trial, pareto

_GREY, _GRID = "#9aa5b1", "#e4e7eb"
_RING: dict[str, Any] = {"facecolors": "none", "edgecolors": COLOURS[1], "linewidth": 1.6}
_BEHIND: dict[str, Any] = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}


def draw(search: Search, every: Sequence[Trial], best: Trial, spreads: Mapping[str, Spread]) -> dict[str, bytes]:
    """PNGs by file name."""
    shares = {name: spread.shares for name, spread in spreads.items() if spread.shares}
    pictures = {"history.png": _history(search, every, best), "parallel.png": _parallel(search, every, best)}
    if shares:
        pictures["importance.png"] = _importance(shares)
    if len(search.config.objectives) > 1:
        pictures["pareto.png"] = _pareto(search, every, best)
    return {name: to_png(picture) for name, picture in pictures.items()}


def _value(trial: Trial, name: str) -> float:
    return float((trial.last or {}).get(name, math.nan))


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _history(search: Search, every: Sequence[Trial], best: Trial) -> Any:
    name = search.config.judged_by
    picture = figure(7.2, 3.8)
    axes = picture.subplots()
    kinds = {
        COMPLETE: ("all edits", {"color": COLOURS[0], "marker": "o"}),
        PRUNED: ("stopped early", {"facecolors": "none", "edgecolors": _GREY, "marker": "o"}),
    }
    for state, (text, look) in kinds.items():
        shown = [trial for trial in every if trial.state == state and trial.last]
        if shown:
            axes.scatter(
                [t.number for t in shown], [_value(t, name) for t in shown], s=26, label=text, zorder=3, **look
            )
    failed = [trial.number for trial in every if trial.state == FAILED]
    if failed:
        low, _ = axes.get_ylim()
        axes.scatter(failed, [low] * len(failed), s=26, color=COLOURS[1], marker="x", label="failed", zorder=3)
    done = [trial for trial in every if trial.state == COMPLETE and trial.last]
    steps = [max(_value(other, name) for other in done if other.number <= trial.number) for trial in done]
    if done:
        ends = [*(trial.number for trial in done), max(trial.number for trial in every)]
        axes.step(ends, [*steps, steps[-1]], where="post", color=COLOURS[0], linewidth=1.2, label="best so far")
        axes.scatter([best.number], [_value(best, name)], s=110, label="best", zorder=4, **_RING)
    axes.set_xlabel("trial", fontsize=9)
    axes.set_ylabel(f"{name}, validation records", fontsize=9)
    axes.grid(axis="y", color=_GRID, zorder=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes)
    picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return picture


def _importance(shares: Mapping[str, Mapping[str, Share]]) -> Any:
    longest = max(len(of_one) for of_one in shares.values())
    picture = figure(3.2 * len(shares) + 2.8, 0.42 * longest + 1.0)
    grid = picture.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    order = list(next(iter(shares.values())))
    order += [path for of_one in shares.values() for path in of_one if path not in order]
    order = list(dict.fromkeys(order))
    for axes, (name, of_one) in zip(grid, shares.items(), strict=True):
        bars = [of_one.get(path, Share(0.0, 0.0, 0.0)) for path in order]
        errors = [[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]]
        widths = [bar.value for bar in bars]
        axes.barh(range(len(order)), widths, xerr=errors, color=COLOURS[0], height=0.62, zorder=2, ecolor=_GREY)
        for y, bar in enumerate(bars):
            axes.text(bar.high + 0.015, y, f"{bar.value:.2f}", va="center", fontsize=8)
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(0, min(1.12, max(bar.high for bar in bars) * 1.2 + 0.05))
        axes.set_xlabel(f"share of the variance of {name}, 95% interval", fontsize=9)
        axes.grid(axis="x", color=_GRID, zorder=0)
        _plain(axes)
    return picture


def _height(parameter: Parameter, value: Any) -> float:
    """Position of a value on the parameter's axis, from 0 to 1."""
    dimension = parameter.dimension
    if dimension.choices is not None:
        labels = [label(choice) for choice in dimension.choices]
        return labels.index(label(value)) / max(1, len(labels) - 1)
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if dimension.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    """Heights and texts of an axis' ticks."""
    dimension = parameter.dimension
    if dimension.choices is not None:
        return [(_height(parameter, choice), str(choice)) for choice in dimension.choices]
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    values = [low, high]
    if dimension.log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        values = [low, *(10.0**power for power in range(first, last + 1)), high]
    elif parameter.is_whole and high - low <= 10:
        values = [low + offset for offset in range(int(high - low) + 1)]
    kept: list[tuple[float, str]] = []
    for value in dict.fromkeys(values):
        height = _height(parameter, value)
        if all(abs(height - other) > 0.04 for other, _ in kept):
            kept.append((height, f"{value:g}"))
    return kept


def _parallel(search: Search, every: Sequence[Trial], best: Trial) -> Any:
    """One line per trial from axis to axis; darker is better, stopped trials are pale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    name, every_parameter = search.config.judged_by, search.space.parameters
    parameters = [parameter for parameter in every_parameter if not parameter.is_fixed] or every_parameter
    shown = [trial for trial in every if trial.last and trial.state in (COMPLETE, PRUNED)]
    values = [_value(trial, name) for trial in shown if trial.state == COMPLETE] or [0.0, 1.0]
    scale = Normalize(min(values), max(max(values), min(values) + 1e-3))
    colours = colormaps["viridis_r"]
    picture = figure(1.5 * len(parameters) + 2.6, 4.4)
    axes = picture.subplots()
    for trial in sorted(shown, key=lambda trial: (trial is best, trial.state == COMPLETE, _value(trial, name))):
        known = [(x, _height(parameter, trial.point[parameter.name])) for x, parameter in enumerate(parameters)
                 if parameter.name in trial.point]  # fmt: skip
        is_done = trial.state == COMPLETE
        axes.plot(
            [x for x, _ in known],
            [y for _, y in known],
            color=COLOURS[1] if trial is best else colours(scale(_value(trial, name))) if is_done else "#d8dde3",
            linewidth=2.4 if trial is best else 1.3 if is_done else 0.8,
            marker="o",
            markersize=3 if is_done else 2,
            zorder=4 if trial is best else 3 if is_done else 2,
        )
    for x, parameter in enumerate(parameters):
        axes.axvline(x, color="#52606d", linewidth=0.8, zorder=1)
        for y, text in _ticks(parameter):
            axes.text(x - 0.03, y, text, ha="right", va="center", fontsize=7, color="#52606d", zorder=5, bbox=_BEHIND)
    axes.set_xlim(-0.45, len(parameters) - 0.8)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xticks(range(len(parameters)), [_broken(parameter.name) for parameter in parameters], fontsize=8)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"orange: best (trial {best.number}); pale: stopped early", fontsize=9)
    bar = picture.colorbar(ScalarMappable(scale, colours), ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(f"{name}, validation records", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return picture


def _broken(name: str) -> str:
    """A long path, broken at its dots: the axes are narrow."""
    return name.replace(".", ".\n") if len(name) > 14 else name


def _pareto(search: Search, every: Sequence[Trial], best: Trial) -> Any:
    """A panel for every pair of objectives, with the Pareto front over all of them."""
    names = search.config.objectives
    pairs = list(combinations(names, 2))
    done = [trial for trial in every if trial.state == COMPLETE and trial.last]
    front = pareto(list(every), names)
    picture = figure(3.4 * len(pairs) + 0.4, 3.6)
    for axes, (x, y) in zip(picture.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        others = [trial for trial in done if trial not in front]
        axes.scatter([_value(t, x) for t in others], [_value(t, y) for t in others], s=22, color=_GREY, label="other")
        axes.scatter(
            [_value(t, x) for t in front], [_value(t, y) for t in front], s=34, color=COLOURS[0], label="front"
        )
        axes.scatter([_value(best, x)], [_value(best, y)], s=120, label=f"best {SCORE} on the front", **_RING)
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
        axes.grid(color=_GRID, zorder=0)
        axes.set_axisbelow(True)
        for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
            low, high = limits
            set_limits(low, min(high, 1.0 + 0.06 * (1.0 - low)))  # no share is above 1
        _plain(axes)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return picture
