"""The search space as data: which settings of a run vary, and in which ranges.

    objective.dual_rate: {low: 1.0e-4, high: 1.0e-1, log: true}
    editor.site: {choices: [layers.1.ffn.out, layers.2.ffn.out]}
    editor.margin_in: {low: 2.0, high: 8.0, when: {editor.name: wise}}
    objective.bandwidths: {scale: {low: 0.1, high: 10.0, log: true}, number: {low: 1, high: 7}}

A list of bandwidths is made of two parameters: as many as `number` says, each `ratio` times the one before, their
geometric mean `scale`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from odedit.errors import InputError, unknown_name
from pipeline import strict
from pipeline.config import RunConfig, from_dict
from pipeline.study.spec import merged
from pipeline.tracking import flatten

Point = dict[str, Any]
"""A value for every parameter that counts at it."""
Number = int | float
_NOT_SEARCHED = ("data", "evaluation", "tracking", "training", "pipeline", "out", "keep_edits")
MAX_LISTED = 10_000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Dimension:
    """The values of one parameter: a range with both ends, or a list.

    Attributes:
        low, high: Ends of the range; whole numbers for a setting that takes nothing else.
        log: Draw the logarithm evenly.
        step: Distance between values; null: any value, and 1 for whole numbers.
        choices: Values without an order.
        when: Parameter -> its value or values with which this one counts; it is left alone otherwise.
    """

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    step: Number | None = None
    choices: list[Any] | None = None
    when: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_range = self.low is not None or self.high is not None
        if is_range == (self.choices is not None):
            raise ValueError("low, high, choices: expected either low and high, or choices.")
        if self.choices is not None:
            if self.log or self.step is not None:
                raise ValueError("choices: 'log' and 'step' belong to a range.")
            if not self.choices or len({label(value) for value in self.choices}) < len(self.choices):
                raise ValueError(
                    f"choices: got {strict.show(self.choices)}, expected at least one, none of them twice."
                )
            return
        if self.low is None or self.high is None:
            raise ValueError(f"{'low' if self.low is None else 'high'}: is missing; a range has both ends.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low: got {self.low}, expected less than high, which is {self.high}.")
        if self.log and self.low <= 0:
            raise ValueError(f"low: got {self.low}, expected more than 0 for a logarithmic range.")
        if self.step is not None and (self.log or not 0 < self.step <= self.high - self.low):
            raise ValueError(
                f"step: got {self.step}, expected more than 0, at most high - low, and no 'log' beside it."
            )

    @property
    def has_whole_ends(self) -> bool:
        """Whether a range is of whole numbers, as far as it says itself."""
        ends = (self.low, self.high, self.step)
        return self.choices is None and all(value is None or isinstance(value, int) for value in ends)


@dataclass(frozen=True)
class Geometric:
    """A list of numbers as two parameters, `<path>.scale` and `<path>.number`.

    Attributes:
        scale: Their geometric mean.
        number: How many.
        ratio: Of each to the one before.
        when: As of `Dimension`.
    """

    scale: Dimension = field(default_factory=lambda: Dimension(low=0.1, high=10.0, log=True))
    number: Dimension = field(default_factory=lambda: Dimension(low=1, high=7))
    ratio: float = 2.0
    when: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ratio > 1:
            raise ValueError(f"ratio: got {self.ratio}, expected more than 1.")
        numbers = self.number.choices if self.number.choices is not None else [self.number.low, self.number.high]
        if not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise ValueError(f"number: got {strict.show(numbers)}, expected whole numbers from 1.")

    def values(self, scale: float, number: int) -> list[float]:
        """
        >>> Geometric().values(1.0, 5)
        [0.25, 0.5, 1.0, 2.0, 4.0]
        """
        return [scale * self.ratio ** (place - (number - 1) / 2) for place in range(number)]

    def parts(self, values: Sequence[float]) -> dict[str, Number] | None:
        """Scale and number of a list, or None if it is no such list."""
        scale = math.exp(math.fsum(math.log(value) for value in values) / len(values))
        made = self.values(scale, len(values))
        is_same = all(math.isclose(a, b, rel_tol=_ROUNDING) for a, b in zip(made, sorted(values), strict=True))
        return {"scale": float(f"{scale:.9g}"), "number": len(values)} if is_same else None


@dataclass(frozen=True)
class Parameter:
    """What a sampler draws: a name, its values, whether they are whole numbers, and when it counts."""

    name: str
    dimension: Dimension
    is_whole: bool
    when: Mapping[str, tuple[str, ...]]

    def ends(self) -> list[Any]:
        """The values that stand for all: both ends, or every choice."""
        one = self.dimension
        return list(one.choices) if one.choices is not None else [self.number(one.low), self.number(one.high)]

    def number(self, value: Any) -> Number:
        return int(value) if self.is_whole else float(value)

    def listed(self) -> list[Any] | None:
        """Every value, or None if there are too many to list."""
        one = self.dimension
        if one.choices is not None:
            return list(one.choices)
        assert one.low is not None and one.high is not None
        step = one.step if one.step is not None else (1 if self.is_whole else None)
        count = None if step is None else math.floor((one.high - one.low) / step + _ROUNDING) + 1
        if step is None or count is None or count > MAX_LISTED:
            return None
        return [self.number(one.low + place * step) for place in range(count)]

    def holds(self, value: Any) -> bool:
        """Whether a sampler could draw the value."""
        listed = self.listed()
        if listed is not None:
            return label(value) in map(label, listed)
        one = self.dimension
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and one.low is not None and one.high is not None and one.low <= value <= one.high

    def draw(self, trial: Any) -> Any:
        """Asks an Optuna trial for a value."""
        one = self.dimension
        if one.choices is not None:
            by_label = {label(value): value for value in one.choices}
            plain = [value if _is_plain(value) else label(value) for value in one.choices]
            found = trial.suggest_categorical(self.name, plain)
            return found if _is_plain(found) and label(found) in by_label else by_label[found]
        if self.is_whole:
            return trial.suggest_int(self.name, one.low, one.high, step=int(one.step or 1), log=one.log)
        return trial.suggest_float(self.name, float(one.low or 0), float(one.high or 0), step=one.step, log=one.log)

    def stored(self, value: Any) -> Any:
        """The value as Optuna holds it: lists and the like as their text."""
        return value if self.dimension.choices is None or _is_plain(value) else label(value)


def label(value: Any) -> str:
    """A value as text that equal values share."""
    return json.dumps(value, sort_keys=True)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def key_of(point: Mapping[str, Any]) -> str:
    """Names a point; equal points have one name."""
    return hashlib.blake2b(label(dict(point)).encode(), digest_size=8).hexdigest()


class Space:
    """Parameters in an order in which each comes after those it depends on.

    Args:
        sections: Path of a setting -> a `Dimension` or `Geometric`, as in YAML.
        settings: What all trials share, as in a run's YAML.

    Raises:
        InputError: A line for each mistake: a setting that is not there, or a value that it refuses.
    """

    def __init__(self, sections: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        if not sections:
            raise InputError("space: got nothing, expected at least one setting and its range.")
        self._base = settings
        problems: list[str] = []
        self._lists: dict[str, Geometric] = {}
        made: dict[str, Parameter] = {}
        for path, section in sections.items():
            try:
                made |= {one.name: one for one in self._parameters(path, section)}
            except InputError as error:
                problems += str(error).splitlines()
        strict.raise_problems(problems)
        self.parameters = _sorted(made)
        strict.raise_problems(self._refused())

    def _parameters(self, path: str, section: Any) -> Iterator[Parameter]:
        where = f"space.{path}"
        if path.split(".")[0] in _NOT_SEARCHED:
            raise InputError(f"{where}: cannot be searched: trials are told apart by how they edit, and nothing else.")
        if isinstance(section, Mapping) and {"scale", "number"} & section.keys():
            found = strict.build(Geometric, section, where)
            self._lists[path] = found
            when = _conditions(found.when)
            yield Parameter(f"{path}.scale", found.scale, False, when)
            yield Parameter(f"{path}.number", found.number, found.number.has_whole_ends, when)
        else:
            one = strict.build(Dimension, section, where)
            yield Parameter(
                path, one, one.has_whole_ends and not self._takes_fractions(path, one), _conditions(one.when)
            )

    def _takes_fractions(self, path: str, one: Dimension) -> bool:
        """Whether the setting takes more than whole numbers; a range of 1 to 4 does not tell."""
        if one.low is None or one.high is None or one.step is not None:
            return False
        try:
            self._build({name: _first(value) for name, value in one.when.items()} | {path: one.low + 0.5})
        except InputError:
            return False
        return True

    def _build(self, values: Mapping[str, Any]) -> RunConfig:
        return from_dict(merged(self._base, nested(values)))

    def _refused(self) -> list[str]:
        """A line for everything that a run would refuse."""
        problems: dict[str, None] = {}
        by_name = {one.name: one for one in self.parameters}
        for one in self.parameters:
            around: Point = {}
            _activate(one, by_name, around)
            for value in one.ends():
                point = around | {one.name: value}
                # A list's other half: any value will do.
                for other in self.parameters:
                    if other.name not in point and other.name.rpartition(".")[0] in self._lists:
                        point[other.name] = other.ends()[0]
                try:
                    self.config(point)
                except InputError as error:
                    is_named = one.dimension.choices is None or len(one.dimension.choices) > 1
                    at = f" at {strict.show(value)}" if is_named else ""
                    for line in str(error).splitlines():
                        is_unknown = line.startswith(f"{one.name}: unknown key")
                        problems[f"space.{line}" if is_unknown else f"space.{one.name}{at}: {line}"] = None
        return list(problems)

    def point(self, trial: Any) -> Point:
        """Draws every parameter that counts from an Optuna trial."""
        point: Point = {}
        for one in self.parameters:
            if _counts(one, point):
                point[one.name] = one.draw(trial)
        return point

    def stored(self, point: Mapping[str, Any]) -> Point:
        """The point as Optuna holds it."""
        return {one.name: one.stored(point[one.name]) for one in self.parameters if one.name in point}

    def settings(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Setting -> value: what a point means."""
        found = {name: value for name, value in point.items() if name.rpartition(".")[0] not in self._lists}
        for path, one in self._lists.items():
            if f"{path}.scale" in point and f"{path}.number" in point:
                found[path] = one.values(float(point[f"{path}.scale"]), int(point[f"{path}.number"]))
        return found

    def config(self, point: Mapping[str, Any]) -> RunConfig:
        """The run at a point. Raises InputError if its settings do not go together."""
        return self._build(self.settings(point))

    def defaults(self) -> Point | None:
        """The point at which nothing is changed, or None if the space does not hold it."""
        flat = flatten(from_dict(self._base).to_dict())
        for path, of_list in self._lists.items():
            parts = of_list.parts(flat[path]) if isinstance(flat.get(path), list) and flat[path] else None
            flat |= {f"{path}.{name}": value for name, value in (parts or {}).items()}
        point: Point = {}
        for one in self.parameters:
            if _counts(one, point):
                if one.name not in flat or not one.holds(flat[one.name]):
                    return None
                is_number = one.dimension.choices is None
                point[one.name] = one.number(flat[one.name]) if is_number else flat[one.name]
        return point

    @cached_property
    def every_point(self) -> list[Point] | None:
        """All points, or None if they are too many to list."""
        if any(one.listed() is None for one in self.parameters):
            return None
        found = list(islice(self._points({}, 0), MAX_LISTED + 1))
        return found if len(found) <= MAX_LISTED else None

    def _points(self, point: Point, place: int) -> Iterator[Point]:
        if place == len(self.parameters):
            yield point
            return
        one = self.parameters[place]
        if not _counts(one, point):
            yield from self._points(point, place + 1)
            return
        for value in one.listed() or ():
            yield from self._points(point | {one.name: value}, place + 1)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    >>> nested({"editor.name": "ftl", "seed": 1})
    {'editor': {'name': 'ftl'}, 'seed': 1}
    """
    result: dict[str, Any] = {}
    for path, value in values.items():
        section = result
        *parents, last = path.split(".")
        for part in parents:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise InputError(f"space.{path}: {part!r} is searched as a whole as well.")
        section[last] = value
    return result


def _conditions(when: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(label(one) for one in (value if isinstance(value, list) else [value]))
        for name, value in when.items()
    }


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _counts(one: Parameter, point: Mapping[str, Any]) -> bool:
    return all(name in point and label(point[name]) in wanted for name, wanted in one.when.items())


def _activate(one: Parameter, by_name: Mapping[str, Parameter], around: Point) -> None:
    """Sets what has to be set for a parameter to count."""
    for name, wanted in one.when.items():
        around[name] = json.loads(wanted[0])
        _activate(by_name[name], by_name, around)


def _sorted(made: Mapping[str, Parameter]) -> tuple[Parameter, ...]:
    """Each after those that its `when` names. Raises InputError for a name that is not there, a value, or a circle."""
    problems = []
    for one in made.values():
        for name, wanted in one.when.items():
            if name not in made:
                problems.append(f"space.{one.name}.when: {unknown_name('parameter', name, made)}")
            elif not wanted or not all(made[name].holds(json.loads(value)) for value in wanted):
                problems.append(f"space.{one.name}.when: {name} never is {', '.join(wanted) or 'anything of nothing'}.")
    strict.raise_problems(problems)
    placed: dict[str, Parameter] = {}
    while len(placed) < len(made):
        ready = [one for one in made.values() if one.name not in placed and one.when.keys() <= placed.keys()]
        if not ready:
            names = ", ".join(sorted(made.keys() - placed.keys()))
            raise InputError(f"space: the conditions of {names} go round in a circle.")
        placed |= {one.name: one for one in ready}
    return tuple(placed.values())
