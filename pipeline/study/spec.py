"""Settings of a study, read from one YAML file: shared settings, axes, and the comparisons.

An arm is one combination of a label of every axis, and an ordinary run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from odedit import ways
from odedit.errors import InputError, unknown_name
from odedit.evaluation.statistics import SHOWN
from odedit.runtime.addresses import below
from pipeline.config import strict
from pipeline.config.run import RunConfig, apply_override, commit_from_dict, from_dict, read_yaml

FOLDER = Path(__file__).with_name("studies")
SEED = "seed"
"""Label of a run, not of an arm: the seed of its records."""
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Draw:
    """Records drawn from the embedded benchmark.

    Attributes:
        split: `train`, `validation` or `evaluation`.
        seeds: Seeds of the benchmark; each draws other values, wordings and pictures of the same facts.
        per_task: Number of records of each task and seed, spread over the facts; null: all.
        per_fact: Number of records of each fact and seed, the first ones, in the benchmark's order; null: all. A number
            needs `per_task: null`.
        rephrases: Number of text rephrases and of image rephrases that a record brings along for its supervision; an
            arm reads `supervision.rephrases` of them.
    """

    split: Literal["train", "validation", "evaluation"] = "evaluation"
    seeds: tuple[int, ...] = (0,)
    per_task: int | None = 24
    per_fact: int | None = None
    rephrases: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if (
            (self.per_task is not None and self.per_task < 1)
            or not self.seeds
            or len(set(self.seeds)) < len(self.seeds)
        ):
            raise ValueError("seeds, per_task: expected different seeds, at least one, and at least 1 edit per task.")
        if self.per_fact is not None and (self.per_fact < 1 or self.per_task is not None):
            raise ValueError(f"per_fact: got {self.per_fact}; expected at least 1, and per_task: null.")


@dataclass(frozen=True)
class Models:
    """Models that a study commits its records to: one for each arm and seed.

    The study has two further axes, `way` and `facts`. Its own axis `way` has settings of ways that differ from the
    defaults; a label there that is no way names one in `commit.way`.

    Attributes:
        sizes: Labels of the axis `facts`: numbers of records, the first ones drawn.
        ways: Labels of the axis `way`; null: every file of `odedit/ways`, and the study's own labels.
    """

    sizes: tuple[int, ...]
    ways: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if self.ways is not None:
            object.__setattr__(self, "ways", tuple(self.ways))
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes: got {list(self.sizes)}, expected numbers of facts, at least one.")

    def known(self, own: Mapping[str, Mapping[str, Any]]) -> KeysView[str]:
        """Every label of the axis `way`, in order: files of `odedit/ways`, and the study's own axis `way`."""
        return dict.fromkeys((*ways.names(), *own)).keys()

    def axes(self, own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
        """Axis -> label -> settings.

        Args:
            own: The study's own axis `way`.
        """
        labels = self.known(own) if self.ways is None else self.ways
        return {
            "way": {label: merged({"commit": {"way": label}}, own.get(label) or {}) for label in labels},
            "facts": {str(size): {"data": {"limit": size}} for size in self.sizes},
        }


@dataclass(frozen=True)
class Plot:
    """The picture of a study.

    Attributes:
        kind: `dots` (a row of points for each label of axis `y`), `lines` (over axis `x`), `bands` (lines with bands
            over axis `x`, whose labels are numbers), `heatmap` (`x` by `y`), `states` (t-SNE of hidden states) or
            `fronts` (those of the study's section `fronts`).
        x: Axis of the study along x.
        y: Axis of the study along y.
        colour: Axis of the study by colour.
        columns: Result columns, one panel each.
        reference: Label of axis `x` drawn as a horizontal line instead of a point.
        front: Two columns drawn against each other in a last panel, the first along x, at the last label of axis `x`;
            only with `bands`.
    """

    kind: Literal["dots", "lines", "bands", "heatmap", "states", "fronts"] = "dots"
    x: str | None = None
    y: str | None = None
    colour: str | None = None
    columns: tuple[str, ...] = SHOWN
    reference: str | None = None
    front: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "front", tuple(self.front))
        if self.front and (len(self.front) != 2 or self.kind != "bands"):
            raise ValueError(f"front: got {list(self.front)}; expected two columns, and kind: bands.")


@dataclass(frozen=True)
class Fronts:
    """Fronts of generality against near locality, see `pipeline.study.fronts`.

    Attributes:
        of: Axis whose labels have a front each.
        over: Axes along which a front's points lie, such as the stop and the locality weight.
        against: Label of `of` whose front the others are tested against.
        near: Column of near locality.
        columns: Columns of generality, a front each.
    """

    of: str
    over: tuple[str, ...]
    against: str
    near: str = "m_loc_near"
    columns: tuple[str, ...] = ("m_gen", "tm_gen", "m_gen_exact")

    def __post_init__(self) -> None:
        object.__setattr__(self, "over", tuple(self.over))
        object.__setattr__(self, "columns", tuple(self.columns))


@dataclass(frozen=True)
class Attribution:
    """Runs by which a gain is divided into what the rephrases give as training data and what an objective gives.

    Attributes:
        axis: Axis with these labels.
        native: Label of the editor's own loss.
        control: Label of the likelihood of edit and rephrase.
        objectives: Labels whose gains over `native` are divided.
    """

    axis: str
    native: str
    control: str
    objectives: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))


@dataclass(frozen=True)
class Special:
    """Settings of some arms only.

    Attributes:
        when: Axis -> labels; an arm needs one of the labels on every axis.
        set: Settings of these arms.
    """

    when: dict[str, list[str]]
    set: dict[str, Any]


@dataclass(frozen=True)
class StudyConfig:
    """A study; the shipped files are examples.

    Attributes:
        title: Title of the tables, in a line.
        note: Text below the tables.
        draw: Records drawn from the embedded benchmark; null: the records of `settings.data`.
        models: Models that the records are committed to; null: every record is an edit of its own.
        settings: Settings of all arms, as in a run's YAML.
        axes: Axis -> label -> settings.
        special: Further settings of some arms; later ones win.
        skip: Combinations to leave out, as axis -> labels.
        baseline: Axis -> label of the baseline: every arm is tested against the arm with these labels and otherwise its
            own. Without effect if `models.ways` leaves it out.
        compared: Axis -> label that is tested against every other label of the axis, in a table of its own.
        columns: Result columns of the first table.
        further: Result columns of a second table.
        fronts: Fronts of generality against near locality, in a table of their own.
        attribution: Runs that say, in the first lines, what is due to the rephrases and what to the objective.
        correlate: Result column whose rank correlation with each arm's gain over its baseline is tabled.
        plot: The picture.
    """

    title: str
    axes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    note: str = ""
    draw: Draw | None = field(default_factory=Draw)
    models: Models | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    special: tuple[Special, ...] = ()
    skip: tuple[dict[str, list[str]], ...] = ()
    baseline: dict[str, str] = field(default_factory=dict)
    compared: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = SHOWN
    further: tuple[str, ...] = ()
    fronts: Fronts | None = None
    attribution: Attribution | None = None
    correlate: str | None = None
    plot: Plot = field(default_factory=Plot)

    def __post_init__(self) -> None:
        for name in ("special", "skip", "columns", "further"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.models is not None:
            own = self.axes.get("way", {})
            object.__setattr__(self, "axes", self.axes | self.models.axes(own))
            if self.baseline.get("way") in self.models.known(own) - self.axes["way"].keys():
                object.__setattr__(self, "baseline", {})


@dataclass(frozen=True)
class Arm:
    """One run of a study.

    Attributes:
        labels: Axis -> label.
        values: Settings, as `pipeline.config.run.from_dict` takes them.
    """

    labels: dict[str, str]
    values: dict[str, Any]

    @property
    def name(self) -> str:
        return ", ".join(self.labels.values())

    @property
    def folder(self) -> str:
        """The labels as a folder's name, made of letters, digits, `.`, `_` and `-`."""
        return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.") or "-" for label in self.labels.values())


def names() -> tuple[str, ...]:
    """Names of the shipped studies."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load(name: str, config: Path | None, overrides: Sequence[str] = ()) -> StudyConfig:
    """Reads a shipped study, with the changes of a user's YAML and of `key=value` overrides.

    Sections of the user's YAML are merged key by key; an axis is replaced as a whole.

    Raises:
        InputError: There is no such study, or settings are wrong.
    """
    if name not in names():
        raise unknown_name("study", name, names())
    values = read_yaml(FOLDER / f"{name}.yaml")
    shipped = {axis: set(labels) for axis, labels in values.get("axes", {}).items()}
    if config is not None:
        changes = read_yaml(config)
        axes = changes.pop("axes", None) or {}
        if not isinstance(axes, Mapping):
            raise InputError(f"{config}: axes: got {strict.show(axes)}, expected axis -> label -> settings.")
        values = merged(values, changes)
        values["axes"] = {axis: labels for axis, labels in {**values.get("axes", {}), **axes}.items() if labels}
    for text in overrides:
        apply_override(values, text)
    study = strict.build(StudyConfig, values)
    _check(study, shipped)
    return study


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings; values of the second win. Settings of an editor are replaced if its name differs.

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
    """Raises InputError for an unknown axis or label.

    Args:
        shipped: Axes and labels of the shipped study; its `skip` and `special` may name those that the user left out.
    """
    axes, plot = study.axes, study.plot
    drawn = {axis for axis in (plot.x, plot.y, plot.colour) if axis}
    for axis in sorted({*drawn, *study.baseline, *study.compared} - axes.keys()):
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
    _check_fronts(study)
    if plot.kind == "heatmap" and not (plot.x and plot.y):
        raise InputError("plot: a heat map needs the axes x and y.")
    if plot.kind == "bands":
        for label in axes[plot.x or next(iter(axes))]:
            if not label.isdecimal() or not int(label):
                raise InputError(f"plot: bands need numbers above 0 as labels of their axis x; got {label!r}.")
    if plot.reference is not None and axes:
        _check_label("plot.reference", plot.reference, axes[plot.x or next(iter(axes))])
    arms(study)


def _check_fronts(study: StudyConfig) -> None:
    """Raises InputError for an unknown axis or label in `fronts` or `attribution`."""
    axes, fronts, attribution = study.axes, study.fronts, study.attribution
    if fronts is None and study.plot.kind == "fronts":
        raise InputError("plot: kind 'fronts' draws the study's section 'fronts', which is missing.")
    named = [*((fronts.of, *fronts.over) if fronts else ()), *((attribution.axis,) if attribution else ())]
    for axis in named:
        if axis not in axes:
            raise unknown_name("axis", axis, axes)
    if fronts is not None:
        _check_label("fronts.against", fronts.against, axes[fronts.of])
    if attribution is not None:
        for label in (attribution.native, attribution.control, *attribution.objectives):
            _check_label("attribution", label, axes[attribution.axis])


def _check_label(where: str, label: str, known: Iterable[str]) -> None:
    if label not in known:
        raise unknown_name(f"label of {where}", label, known)


def arms(study: StudyConfig) -> list[Arm]:
    """Arms of a study, in the order of the axes and without the skipped combinations.

    Raises:
        InputError: No combination is left, or two arms would share a folder.
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


def runs(study: StudyConfig) -> list[tuple[Arm, Arm]]:
    """Each run of a study as an arm, and the arm whose tables it is in: where records become models, one per seed."""
    every = arms(study)
    if study.models is None or study.draw is None:
        return [(arm, arm) for arm in every]
    return [(replace(arm, labels=arm.labels | {SEED: str(seed)}), arm) for arm in every for seed in study.draw.seeds]


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
    """The arm's run.

    Args:
        arm: The arm.
        out: Folder or address of the study.
        data: Section `data` of the drawn records; None: the study's own.

    Raises:
        InputError: Settings are wrong; the message names the arm.
    """
    values = merged(arm.values, {"data": data} if data else {}) | {"out": below(str(out), f"arms/{arm.folder}")}
    try:
        return commit_from_dict(values) if values.get("commit") else from_dict(values)
    except InputError as error:
        raise InputError(f"{arm.name}: {error}") from error
