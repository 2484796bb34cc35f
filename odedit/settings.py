"""Dataclasses of settings, whose values are checked against types and bounds in the annotations.

@dataclass(frozen=True)
class GainsConfig(Settings):
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    max_steps: Annotated[int, Ge(1)] = 10
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "nothing (null)",
    Any: "anything",
}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
"""Signs of the bounds of `annotated_types`, by attribute."""


class Settings:
    """Base of a dataclass of settings. Raises ValueError for a value that its annotation does not allow.

    A class with `PRESETS` takes the key `preset` in a configuration: the named values stand where no other is given.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str, **given: Any) -> Self:
        """Settings of a preset. Raises ValueError for an unknown name, or a preset without effect.

        Args:
            name: Key of `PRESETS`.
            given: Settings that differ from the preset.
        """
        if not isinstance(name, str) or name not in cls.PRESETS:
            raise ValueError(refusal("preset", name, Literal[tuple(cls.PRESETS)]))
        if cls.PRESETS[name].keys() <= given.keys():
            # A run's own record lists all settings; a preset added to it would silently do nothing.
            raise ValueError(
                f"preset: got {name!r}, but every setting that it names is given as well; leave out the preset, or the "
                f"settings that it is to set: {', '.join(cls.PRESETS[name])}."
            )
        return cls(**{**cls.PRESETS[name], **given})

    def __post_init__(self) -> None:
        for name, annotation in _checked(type(self)).items():
            value = getattr(self, name)
            if not _is_allowed(value, annotation):
                raise ValueError(refusal(name, value, annotation))


def _is_allowed(value: Any, annotation: Any) -> bool:
    """Whether a value, or the value that it becomes in JSON, fits: a list for a tuple, a NumPy number for a number."""
    try:
        adapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        text = json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other))
        try:
            adapter(annotation).validate_json(text, strict=True)
        except ValidationError:
            return False
    return True


def _checked(cls: type) -> dict[str, Any]:
    """Annotations of the fields by name, except nested dataclasses, which are checked when they are made."""
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: hints[name] for name in names if section_type(hints[name]) is None}


@lru_cache(maxsize=256)
def adapter(annotation: Any) -> TypeAdapter[Any]:
    """Pydantic's validator of an annotation; infinite numbers and NaN are refused."""
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))


def section_type(annotation: Any) -> type | None:
    """The dataclass behind `Section` or `Section | None`; None for anything else."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    sections = [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]
    return sections[0] if sections else None


def refusal(name: str, value: Any, annotation: Any) -> str:
    """The message for a value that its annotation does not allow, with the most similar choice for a misspelt value.

    >>> refusal("mask", "entrys", Literal["entries", "columns"])
    "mask: got 'entrys', expected 'entries' or 'columns'. Did you mean 'entries'?"
    """
    choices = [choice for choice in _choices(annotation) if isinstance(choice, str)]
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name}: got {show(value)}, expected {describe(annotation)}.{hint}"


def _choices(annotation: Any) -> list[Any]:
    """Choices of all `Literal` parts of an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def describe(annotation: Any) -> str:
    """An annotation in words, for messages.

    >>> describe(int | None), describe(Literal["auto"] | int)
    ('a whole number or nothing (null)', "'auto' or a whole number")
    >>> from annotated_types import Ge, Lt
    >>> from typing import Annotated
    >>> describe(Annotated[float, Ge(0), Lt(1)])
    'a finite number >= 0 and < 1'
    """
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in get_args(annotation))
    if origin in (tuple, list, frozenset, set):
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        return f"a list of {describe(inner[0])}" if inner else "a list"
    if origin in (dict, Mapping) or annotation in (dict, Mapping):
        return "a section of keys and values"
    if hasattr(annotation, "__metadata__"):
        return " ".join([describe(get_args(annotation)[0]), *_bounds(annotation.__metadata__)])
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: tuple[Any, ...]) -> list[str]:
    """The bounds of an `Annotated` as one text in a list; an empty list without bounds."""
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in metadata
        for name, sign in _SIGNS.items()
        if getattr(bound, name, None) is not None
    ]
    bounds += [f"that matches {bound.pattern}" for bound in metadata if getattr(bound, "pattern", None) is not None]
    return [" and ".join(bounds)] if bounds else []


def show(value: Any) -> str:
    """A value as messages quote it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
