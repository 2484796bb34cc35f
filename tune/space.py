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
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

from odedit.errors import InputError, unknown_name
from pipeline.config import strict
from pipeline.config.run import RunConfig, from_dict
from pipeline.config.values import flatten
from pipeline.study.spec import merged
from tune.dimensions import MAX_LISTED, Dimension, Geometric, Parameter, label

Point = dict[str, Any]
"""A value for every parameter that counts at it."""
_NOT_SEARCHED = ("data", "evaluation", "tracking", "training", "pipeline", "out", "keep_edits")


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
                        where, _, what = line.partition(": ")
                        is_unknown = what.startswith("unknown key") and f"{one.name}.".startswith(f"{where}.")
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
        names = [one.name for one in self.parameters if one.name in point]
        found = {name: point[name] for name in names if name.rpartition(".")[0] not in self._lists}
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
