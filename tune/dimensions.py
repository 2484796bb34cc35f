"""Values of a searched parameter: a range, a list of choices, or a geometric sequence made of two parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import strict

MAX_LISTED = 10_000
"""Largest number of values or points that are listed."""
_ROUNDING = 1e-9
Number = int | float


@dataclass(frozen=True)
class Dimension:
    """Values of one parameter: a range including both ends, or a list of choices.

    Attributes:
        low: Lower end of the range; an integer for an integer setting.
        high: Upper end of the range; an integer for an integer setting.
        log: Sample uniformly in the logarithm.
        step: Distance between values; null: 1 for integers, none for other numbers.
        choices: Values without an order.
        when: Parameter -> value or values; this parameter is active only if the others have these values.
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
        """True for a range whose ends and step are integers."""
        ends = (self.low, self.high, self.step)
        return self.choices is None and all(value is None or isinstance(value, int) for value in ends)


@dataclass(frozen=True)
class Geometric:
    """A geometric sequence as two parameters, `<path>.scale` and `<path>.number`.

    Attributes:
        scale: Geometric mean of the sequence.
        number: Length of the sequence.
        ratio: Ratio of consecutive numbers.
        when: Condition; see `Dimension`.
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
        """The sequence.

        >>> Geometric().values(1.0, 5)
        [0.25, 0.5, 1.0, 2.0, 4.0]
        """
        return [scale * self.ratio ** (index - (number - 1) / 2) for index in range(number)]

    def parts(self, values: Sequence[float]) -> dict[str, Number] | None:
        """Scale and number of a list, or None if it is no such sequence."""
        scale = math.exp(math.fsum(math.log(value) for value in values) / len(values))
        made = self.values(scale, len(values))
        is_same = all(math.isclose(a, b, rel_tol=_ROUNDING) for a, b in zip(made, sorted(values), strict=True))
        return {"scale": float(f"{scale:.9g}"), "number": len(values)} if is_same else None


@dataclass(frozen=True)
class Parameter:
    """One value that a sampler draws.

    Attributes:
        name: Path of a setting, or `<path>.scale` or `<path>.number`.
        dimension: Values of the parameter.
        is_whole: True for integers.
        when: Parameter -> labels of values; this parameter is active only if the others have these values.
    """

    name: str
    dimension: Dimension
    is_whole: bool
    when: Mapping[str, tuple[str, ...]]

    @property
    def is_fixed(self) -> bool:
        """True for a single value, which a space holds so that all its trials have it."""
        return self.dimension.choices is not None and len(self.dimension.choices) == 1

    def ends(self) -> list[Any]:
        """Both ends of the range, or every choice."""
        values = self.dimension
        if values.choices is not None:
            return list(values.choices)
        return [self.number(values.low), self.number(values.high)]

    def number(self, value: Any) -> Number:
        return int(value) if self.is_whole else float(value)

    def listed(self) -> list[Any] | None:
        """Every value, or None if there are too many to list."""
        values = self.dimension
        if values.choices is not None:
            return list(values.choices)
        assert values.low is not None and values.high is not None
        step = values.step if values.step is not None else (1 if self.is_whole else None)
        count = None if step is None else math.floor((values.high - values.low) / step + _ROUNDING) + 1
        if step is None or count is None or count > MAX_LISTED:
            return None
        return [self.number(values.low + index * step) for index in range(count)]

    def holds(self, value: Any) -> bool:
        """True if a sampler can draw the value."""
        listed = self.listed()
        if listed is not None:
            return label(value) in map(label, listed)
        values = self.dimension
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and values.low is not None and values.high is not None and values.low <= value <= values.high

    def draw(self, trial: Any) -> Any:
        """Asks an Optuna trial for a value."""
        values = self.dimension
        if values.choices is not None:
            by_label = {label(value): value for value in values.choices}
            plain = [value if is_plain(value) else label(value) for value in values.choices]
            drawn = trial.suggest_categorical(self.name, plain)
            return drawn if is_plain(drawn) and label(drawn) in by_label else by_label[drawn]
        if self.is_whole:
            return trial.suggest_int(self.name, values.low, values.high, step=int(values.step or 1), log=values.log)
        return trial.suggest_float(
            self.name, float(values.low or 0), float(values.high or 0), step=values.step, log=values.log
        )

    def stored(self, value: Any) -> Any:
        """The value as Optuna stores it: lists and mappings as JSON."""
        return value if self.dimension.choices is None or is_plain(value) else label(value)


def label(value: Any) -> str:
    """A value as JSON; equal values have the same text."""
    return json.dumps(value, sort_keys=True)


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
