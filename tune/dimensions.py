"""The values that a parameter may take: a range, a list, or a list of numbers made of two parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import strict

MAX_LISTED = 10_000
"""More values or points than these are not listed."""
_ROUNDING = 1e-9
Number = int | float


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
            plain = [value if is_plain(value) else label(value) for value in one.choices]
            found = trial.suggest_categorical(self.name, plain)
            return found if is_plain(found) and label(found) in by_label else by_label[found]
        if self.is_whole:
            return trial.suggest_int(self.name, one.low, one.high, step=int(one.step or 1), log=one.log)
        return trial.suggest_float(self.name, float(one.low or 0), float(one.high or 0), step=one.step, log=one.log)

    def stored(self, value: Any) -> Any:
        """The value as Optuna holds it: lists and the like as their text."""
        return value if self.dimension.choices is None or is_plain(value) else label(value)


def label(value: Any) -> str:
    """A value as text that equal values share."""
    return json.dumps(value, sort_keys=True)


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
