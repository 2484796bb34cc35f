"""Settings are refused alike, whether they come from YAML or from plain Python."""

from __future__ import annotations

import doctest
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le

from odedit import settings
from odedit.errors import InputError
from odedit.settings import Settings, describe
from pipeline.config import strict


@dataclass(frozen=True)
class _Config(Settings):
    rate: Annotated[float, Gt(0)] = 1e-3
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    steps: Annotated[int, Ge(1)] | None = None
    actors: Literal["auto"] | Annotated[int, Ge(1)] = "auto"
    widths: tuple[Annotated[float, Gt(0)], ...] = (1.0,)
    name: str = ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "rate: got 0.0, expected a finite number > 0."),
        ({"rate": "fast"}, "rate: got 'fast', expected a finite number > 0."),
        ({"rate": None}, "rate: got None, expected a finite number > 0."),
        ({"share": 1.5}, "share: got 1.5, expected a finite number > 0 and <= 1."),
        ({"steps": 0}, "steps: got 0, expected a whole number >= 1 or nothing (null)."),
        ({"steps": 1.5}, "steps: got 1.5, expected a whole number >= 1 or nothing (null)."),
        ({"actors": 0}, "actors: got 0, expected 'auto' or a whole number >= 1."),
        ({"name": 3}, "name: got 3, expected text."),
        ({"actors": "atuo"}, "actors: got 'atuo', expected 'auto' or a whole number >= 1. Did you mean 'auto'?"),
    ],
)
def test_yaml_and_python_are_refused_with_the_same_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as in_python:
        _Config(**change)
    with pytest.raises(InputError) as in_yaml:
        strict.build(_Config, change)
    assert str(in_python.value) == str(in_yaml.value) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"rate: got (nan|inf), expected a finite number > 0\."):
        _Config(rate=value)


def test_every_item_of_a_list_is_checked() -> None:
    with pytest.raises(ValueError, match=r"widths: got \(1.0, -1.0\), expected a list of a finite number > 0\."):
        _Config(widths=(1.0, -1.0))


def test_what_is_allowed_is_accepted_as_it_is() -> None:
    config = _Config(rate=1, steps=3, actors=2, widths=(0.5, 2.0), name="a")
    assert config == replace(config) and config.rate == 1


def test_all_bounds_are_put_in_words() -> None:
    assert describe(Annotated[int, Interval(ge=1, lt=9)]) == "a whole number >= 1 and < 9"
    assert describe(Annotated[str, "no bound"]) == "text"
    assert doctest.testmod(settings).failed == 0
