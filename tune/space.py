"""The search space: the settings of a run that vary, and their values.

    objective.dual_rate: {low: 1.0e-4, high: 1.0e-1, log: true}
    editor.site: {choices: [layers.1.ffn.out, layers.2.ffn.out]}
    editor.margin_in: {low: 2.0, high: 8.0, when: {editor.name: wise}}
    objective.bandwidths: {scale: {low: 0.1, high: 10.0, log: true}, number: {low: 1, high: 7}}

A list of bandwidths has `number` values, each `ratio` times the one before, with geometric mean `scale`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from itertools import islice, product
from typing import Any

from odedit.errors import InputError, unknown_name
from pipeline.config import strict
from pipeline.config.run import RunConfig, from_dict
from pipeline.config.values import flatten
from pipeline.study.spec import merged
from tune.dimensions import MAX_LISTED, Dimension, Geometric, Parameter, label

Point = dict[str, Any]
"""A value for every active parameter."""
_NOT_SEARCHED = ("data", "evaluation", "tracking", "training", "pipeline", "out", "keep_edits")


def key_of(point: Mapping[str, Any]) -> str:
    """A short hash of the point."""
    return hashlib.blake2b(label(dict(point)).encode(), digest_size=8).hexdigest()


class Space:
    """The parameters of a search, each after those that its condition names.

    Args:
        sections: Path of a setting -> a `Dimension` or `Geometric`, as in YAML.
        settings: Settings of all trials, as in a run's YAML.

    Raises:
        InputError: A setting does not exist or refuses a value: one line for each.
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
                made |= {parameter.name: parameter for parameter in self._parameters(path, section)}
            except InputError as error:
                problems += str(error).splitlines()
        strict.raise_problems(problems)
        self.parameters = _sorted(made)
        strict.raise_problems(self._refused())

    def _parameters(self, path: str, section: Any) -> Iterator[Parameter]:
        where = f"space.{path}"
        if path.split(".")[0] in _NOT_SEARCHED:
            raise InputError(f"{where}: cannot be searched: trials may differ only in settings that change the edits.")
        if path.rpartition(".")[2] == "preset":
            raise InputError(
                f"{where}: cannot be searched; search the settings that it sets, or name it in 'settings'."
            )
        if isinstance(section, Mapping) and {"scale", "number"} & section.keys():
            sequence = strict.build(Geometric, section, where)
            self._lists[path] = sequence
            when = _conditions(sequence.when)
            yield Parameter(f"{path}.scale", sequence.scale, False, when)
            yield Parameter(f"{path}.number", sequence.number, sequence.number.has_whole_ends, when)
        else:
            dimension = strict.build(Dimension, section, where)
            is_whole = dimension.has_whole_ends and not self._takes_fractions(path, dimension)
            yield Parameter(path, dimension, is_whole, _conditions(dimension.when))

    def _takes_fractions(self, path: str, dimension: Dimension) -> bool:
        """True if the setting accepts fractions: a range from 1 to 4 may be one of floats."""
        if dimension.low is None or dimension.high is None or dimension.step is not None:
            return False
        try:
            self._build({name: _first(value) for name, value in dimension.when.items()} | {path: dimension.low + 0.5})
        except InputError:
            return False
        return True

    def _build(self, values: Mapping[str, Any]) -> RunConfig:
        return from_dict(merged(self._base, nested(values)))

    def _refused(self) -> list[str]:
        """Mistakes of the space: one line for everything that a run refuses."""
        problems: dict[str, None] = {}
        by_name = {parameter.name: parameter for parameter in self.parameters}
        # A single value may be what another parameter's range needs.
        fixed = {each.name: each.ends()[0] for each in self.parameters if each.is_fixed and not each.when}
        for parameter in self.parameters:
            conditions = dict(fixed)
            _activate(parameter, by_name, conditions)
            for value in parameter.ends():
                point = conditions | {parameter.name: value}
                # A sequence needs both its parameters; any value of the other one will do.
                for other in self.parameters:
                    if other.name not in point and other.name.rpartition(".")[0] in self._lists:
                        point[other.name] = other.ends()[0]
                try:
                    self.config(point)
                except InputError as error:
                    problems |= dict.fromkeys(_located(line, parameter, value) for line in str(error).splitlines())
        return list(problems)

    def point(self, trial: Any) -> Point:
        """Draws every active parameter from an Optuna trial."""
        point: Point = {}
        for parameter in self.parameters:
            if _is_active(parameter, point):
                point[parameter.name] = parameter.draw(trial)
        return point

    def stored(self, point: Mapping[str, Any]) -> Point:
        """The point as Optuna stores it."""
        return {
            parameter.name: parameter.stored(point[parameter.name])
            for parameter in self.parameters
            if parameter.name in point
        }

    def settings(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Path -> value of the settings at a point."""
        names = [parameter.name for parameter in self.parameters if parameter.name in point]
        settings = {name: point[name] for name in names if name.rpartition(".")[0] not in self._lists}
        for path, sequence in self._lists.items():
            if f"{path}.scale" in point and f"{path}.number" in point:
                settings[path] = sequence.values(float(point[f"{path}.scale"]), int(point[f"{path}.number"]))
        return settings

    def config(self, point: Mapping[str, Any]) -> RunConfig:
        """The run at a point. Raises InputError if its settings do not go together."""
        return self._build(self.settings(point))

    def defaults(self) -> Point | None:
        """The point of the default settings, or None if the space does not hold it."""
        flat = flatten(from_dict(self._base).to_dict())
        for path, sequence in self._lists.items():
            parts = sequence.parts(flat[path]) if isinstance(flat.get(path), list) and flat[path] else None
            flat |= {f"{path}.{name}": value for name, value in (parts or {}).items()}
        point: Point = {}
        for parameter in self.parameters:
            name = parameter.name
            if _is_active(parameter, point):
                if name not in flat or not parameter.holds(flat[name]):
                    return None
                is_number = parameter.dimension.choices is None
                point[name] = parameter.number(flat[name]) if is_number else flat[name]
        return point

    def corners(self, names: Container[str]) -> Iterator[RunConfig]:
        """Runs at all combinations of the ends of these parameters, apart from those that are refused.

        The other parameters have their defaults, or their only value.
        """
        chosen = [each for each in self.parameters if not each.when and (each.is_fixed or each.name in names)]
        for values in product(*(each.ends() for each in chosen)):
            try:
                yield self.config(dict(zip((each.name for each in chosen), values, strict=True)))
            except InputError:
                continue

    @cached_property
    def every_point(self) -> list[Point] | None:
        """All points, or None if there are too many to list."""
        if any(parameter.listed() is None for parameter in self.parameters):
            return None
        every = list(islice(self._points({}, 0), MAX_LISTED + 1))
        return every if len(every) <= MAX_LISTED else None

    def _points(self, point: Point, index: int) -> Iterator[Point]:
        """All points that extend `point` by the parameters from `index` on."""
        if index == len(self.parameters):
            yield point
            return
        parameter = self.parameters[index]
        if not _is_active(parameter, point):
            yield from self._points(point, index + 1)
            return
        for value in parameter.listed() or ():
            yield from self._points(point | {parameter.name: value}, index + 1)


def _located(line: str, parameter: Parameter, value: Any) -> str:
    """A run's message with the parameter, and the value unless it is the only one."""
    where, _, message = line.partition(": ")
    if message.startswith("unknown key") and f"{parameter.name}.".startswith(f"{where}."):
        return f"space.{line}"
    choices = parameter.dimension.choices
    at = f" at {strict.show(value)}" if choices is None or len(choices) > 1 else ""
    return f"space.{parameter.name}{at}: {line}"


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by path as nested sections.

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
        name: tuple(label(choice) for choice in (value if isinstance(value, list) else [value]))
        for name, value in when.items()
    }


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _is_active(parameter: Parameter, point: Mapping[str, Any]) -> bool:
    return all(name in point and label(point[name]) in wanted for name, wanted in parameter.when.items())


def _activate(parameter: Parameter, by_name: Mapping[str, Parameter], point: Point) -> None:
    """Sets the parameters at `point` that make this one active."""
    for name, wanted in parameter.when.items():
        point[name] = json.loads(wanted[0])
        _activate(by_name[name], by_name, point)


def _sorted(made: Mapping[str, Parameter]) -> tuple[Parameter, ...]:
    """The parameters, each after those that its condition names.

    Raises:
        InputError: A condition names an unknown parameter or a value that it cannot have, or conditions are circular.
    """
    problems = []
    for parameter in made.values():
        where = f"space.{parameter.name}.when"
        for name, wanted in parameter.when.items():
            if name not in made:
                problems.append(f"{where}: {unknown_name('parameter', name, made)}")
            elif not wanted or not all(made[name].holds(json.loads(value)) for value in wanted):
                problems.append(f"{where}: {name} never is {', '.join(wanted) or 'anything of nothing'}.")
    strict.raise_problems(problems)
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(made):
        left = [parameter for name, parameter in made.items() if name not in ordered]
        ready = {parameter.name: parameter for parameter in left if parameter.when.keys() <= ordered.keys()}
        if not ready:
            names = ", ".join(sorted(made.keys() - ordered.keys()))
            raise InputError(f"space: the conditions of {names} go round in a circle.")
        ordered |= ready
    return tuple(ordered.values())
