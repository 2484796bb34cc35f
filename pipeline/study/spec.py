"""What a study is: settings that all its runs share, axes along which they differ, and what is compared.

A study is data, one YAML. Its arms are the combinations of one value of every axis; an arm is an ordinary run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from odedit.errors import InputError, unknown_name
from odedit.evaluation.statistics import MAIN
from odedit.runtime.addresses import below
from pipeline.config import strict
from pipeline.config.run import RunConfig, apply_override, from_dict, read_yaml

FOLDER = Path(__file__).with_name("studies")
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Draw:
    """Records drawn from the embedded benchmark.

    Attributes:
        split: `train`, `validation` or `evaluation`.
        seeds: Of the benchmark: other values, wordings and pictures of the same facts.
        per_task: Edits of each task and seed, at first one of each fact; null: all there are.
    """

    split: Literal["train", "validation", "evaluation"] = "evaluation"
    seeds: tuple[int, ...] = (0,)
    per_task: int | None = 24

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if (
            (self.per_task is not None and self.per_task < 1)
            or not self.seeds
            or len(set(self.seeds)) < len(self.seeds)
        ):
            raise ValueError("seeds, per_task: expected different seeds, at least one, and at least 1 edit per task.")


@dataclass(frozen=True)
class Plot:
    """The picture of a study.

    Attributes:
        kind: `dots` (a row of points for each value of axis `y`), `lines` (over axis `x`), `heatmap` (`x` by `y`) or
            `states` (t-SNE of hidden states).
        x, y, colour: Axes of the study.
        columns: What is shown.
        reference: Label on axis `x` that is drawn as a level and not as a point.
    """

    kind: Literal["dots", "lines", "heatmap", "states"] = "dots"
    x: str | None = None
    y: str | None = None
    colour: str | None = None
    columns: tuple[str, ...] = MAIN
    reference: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))


@dataclass(frozen=True)
class Special:
    """Settings of the arms that have one of the labels on every axis of `when`."""

    when: dict[str, list[str]]
    set: dict[str, Any]


@dataclass(frozen=True)
class StudyConfig:
    """See the shipped files for examples.

    Attributes:
        title: What is compared, in a line.
        note: What a reader should know beside the table.
        draw: Records of the embedded benchmark; null: those of `settings.data`.
        settings: What all arms share, as in a run's configuration.
        axes: Axis -> label -> settings.
        special: Further settings of some arms; later ones win.
        skip: Combinations that make no sense; labels by axis.
        baseline: Labels that an arm is compared with: the arm that has these and otherwise its own.
        compared: Labels whose arm is compared with each that has others there and is otherwise the same; a table of
            its own.
        columns: Of the table.
        further: Columns of a second table.
        correlate: A column of the edits; tabled is its rank correlation with what the arm gains over the baseline.
        plot: The picture.
    """

    title: str
    axes: dict[str, dict[str, dict[str, Any]]]
    note: str = ""
    draw: Draw | None = field(default_factory=Draw)
    settings: dict[str, Any] = field(default_factory=dict)
    special: tuple[Special, ...] = ()
    skip: tuple[dict[str, list[str]], ...] = ()
    baseline: dict[str, str] = field(default_factory=dict)
    compared: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = MAIN
    further: tuple[str, ...] = ()
    correlate: str | None = None
    plot: Plot = field(default_factory=Plot)

    def __post_init__(self) -> None:
        for name in ("special", "skip", "columns", "further"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Arm:
    """One run of a study.

    Attributes:
        labels: Its value on every axis.
        values: Its configuration, as `pipeline.config.from_dict` takes it.
    """

    labels: dict[str, str]
    values: dict[str, Any]

    @property
    def name(self) -> str:
        return ", ".join(self.labels.values())

    @property
    def folder(self) -> str:
        """The name in letters, digits, `.`, `_` and `-`; not empty, and never a way to another folder."""
        return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.") or "-" for label in self.labels.values())


def names() -> tuple[str, ...]:
    """Studies that ship."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load(name: str, config: Path | None, overrides: Sequence[str] = ()) -> StudyConfig:
    """Reads a study that ships, with what a user's YAML and `key=value` overrides change in it.

    A section of the user's YAML is merged key by key, but an axis is replaced as a whole.

    Raises:
        InputError: No such study, or settings are wrong.
    """
    if name not in names():
        raise unknown_name("study", name, names())
    values = read_yaml(FOLDER / f"{name}.yaml")
    shipped = {axis: set(labels) for axis, labels in values["axes"].items()}
    if config is not None:
        changes = read_yaml(config)
        axes = changes.pop("axes", None) or {}
        if not isinstance(axes, Mapping):
            raise InputError(f"{config}: axes: got {strict.show(axes)}, expected axis -> label -> settings.")
        values = merged(values, changes)
        values["axes"] = {axis: labels for axis, labels in {**values["axes"], **axes}.items() if labels}
    for text in overrides:
        apply_override(values, text)
    study = strict.build(StudyConfig, values)
    _check(study, shipped)
    return study


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other; the second wins. Another editor brings all its settings with it.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    >>> merged({"editor": {"name": "wise", "site": "layers.2.ffn.in"}}, {"editor": {"name": "mend"}})
    {'editor': {'name': 'mend'}}
    """
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _is_other_editor(key, old, value):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _is_other_editor(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return key == "editor" and new.get("name", old.get("name")) != old.get("name")


def _check(study: StudyConfig, shipped: Mapping[str, set[str]]) -> None:
    """Raises InputError for an axis or a label that is not there.

    Args:
        shipped: Axes and labels of the study before the user's changes: where a user leaves some out, what the study
            says about their combinations is no mistake.
    """
    axes, plot = study.axes, study.plot
    shown = {axis for axis in (plot.x, plot.y, plot.colour) if axis}
    for axis in sorted({*shown, *study.baseline, *study.compared} - axes.keys()):
        raise unknown_name("axis", axis, axes)
    for part in (*study.skip, *(special.when for special in study.special)):
        for axis, labels in part.items():
            known = {*axes.get(axis, ()), *shipped.get(axis, ())}
            if not known:
                raise unknown_name("axis", axis, axes)
            for label in labels:
                _check_label(f"axis {axis!r} in 'skip' or 'special'", label, known)
    for axis, label in study.baseline.items():
        _check_label(f"baseline.{axis}", label, axes[axis])
    for axis, label in study.compared.items():
        _check_label(f"compared.{axis}", label, axes[axis])
    if plot.kind == "heatmap" and not (plot.x and plot.y):
        raise InputError("plot: a heat map needs the axes x and y.")
    if plot.reference is not None and axes:
        _check_label("plot.reference", plot.reference, axes[plot.x or next(iter(axes))])
    arms(study)


def _check_label(where: str, label: str, known: Iterable[str]) -> None:
    if label not in known:
        raise unknown_name(f"label of {where}", label, known)


def arms(study: StudyConfig) -> list[Arm]:
    """Every combination but the skipped ones, in the order of the axes.

    Raises:
        InputError: There is none, or two would write to one folder.
    """
    if not study.axes:
        raise InputError("axes: expected at least one axis with at least one label.")
    made = [Arm(labels, _settings(study, labels)) for labels in _combinations(study)]
    if not made:
        raise InputError("axes: no combination is left; look at 'skip'.")
    seen: dict[str, str] = {}
    for arm in made:
        if arm.folder in seen:
            raise InputError(f"axes: {seen[arm.folder]!r} and {arm.name!r} would share the folder {arm.folder!r}.")
        seen[arm.folder] = arm.name
    return made


def _combinations(study: StudyConfig) -> Iterator[dict[str, str]]:
    for chosen in product(*study.axes.values()):
        labels = dict(zip(study.axes, chosen, strict=True))
        if not any(_matches(labels, part) for part in study.skip):
            yield labels


def _matches(labels: Labels, when: Mapping[str, Sequence[str]]) -> bool:
    return all(labels.get(axis) in wanted for axis, wanted in when.items())


def _settings(study: StudyConfig, labels: Labels) -> dict[str, Any]:
    values = dict(study.settings)
    for axis, label in labels.items():
        values = merged(values, study.axes[axis][label])
    for special in study.special:
        if _matches(labels, special.when):
            values = merged(values, special.set)
    return values


def run_config(arm: Arm, out: Path | str, data: Mapping[str, Any] | None) -> RunConfig:
    """The arm's run. Raises InputError, which names the arm."""
    values = merged(arm.values, {"data": data} if data else {})
    try:
        return from_dict(values | {"out": below(str(out), f"arms/{arm.folder}")})
    except InputError as error:
        raise InputError(f"{arm.name}: {error}") from error
