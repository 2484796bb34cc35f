"""Builds nested frozen dataclasses from a mapping. One error lists every mistake by its path.

The dataclasses do not depend on this file: annotations define the allowed types, and `__post_init__` raises ValueError
for a value out of bounds.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from odedit.errors import InputError

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "nothing (null)",
    Any: "anything",
}


def build(cls: type, values: Any, path: str = "") -> Any:
    """Builds the dataclass `cls` from `values`; missing keys keep their defaults.

    Args:
        cls: Dataclass, whose fields may be dataclasses.
        values: Mapping of a YAML section, or None.
        path: Dotted name of the section, for messages.

    Raises:
        InputError: One line for every mistake.
    """
    problems: list[str] = []
    built = _build(cls, values, path, problems)
    raise_problems(problems)
    return built


def raise_problems(problems: Iterable[str]) -> None:
    """Raises one InputError with a line per problem, if there are any."""
    lines = list(problems)
    if lines:
        # YAML can hold lone surrogates, which cannot be printed.
        raise InputError("\n".join(lines).encode("utf-8", "backslashreplace").decode())


def _build(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        keys = ", ".join(field.name for field in dataclasses.fields(cls))
        problems.append(f"{path or 'configuration'}: got {show(values)}, expected a section with keys of: {keys}.")
        return None
    hints = get_type_hints(cls, include_extras=True)
    accepted: dict[str, Any] = {}
    num_before = len(problems)
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints or not _is_field(cls, key):
            problems.append(unknown_key(where, str(key), [field.name for field in dataclasses.fields(cls)]))
        elif (section := section_type(hints[key])) is not None and not (value is None and _allows_none(hints[key])):
            accepted[key] = _build(section, value, where, problems)
        else:
            accepted[key] = _scalar(hints[key], value, where, problems)
    if len(problems) > num_before:
        return None
    try:
        return cls(**accepted)
    except ValueError as error:
        problems.append(f"{path}.{error}" if path else str(error))
    except TypeError as error:  # a required field is missing
        problems.append(f"{path or 'configuration'}: {error}")
    return None


def _scalar(annotation: Any, value: Any, where: str, problems: list[str]) -> Any:
    try:
        # pydantic's strict mode for JSON fits YAML: it takes lists for tuples, and no text for booleans.
        return _adapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        near = _nearest(value, annotation)
        hint = f" Did you mean {near!r}?" if near else ""
        problems.append(f"{where}: got {show(value)}, expected {describe(annotation)}.{hint}")
    return None


@lru_cache(maxsize=256)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))


def unknown_key(where: str, key: str, allowed: Iterable[str]) -> str:
    """Message for an unknown key, with the nearest allowed one.

    >>> unknown_key("pipeline.actor", "actor", ["actors", "batch_size"])
    "pipeline.actor: unknown key. Did you mean 'actors'? Allowed: actors, batch_size."
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{where}: unknown key.{hint} Allowed: {', '.join(names)}."


def describe(annotation: Any) -> str:
    """An annotation in words, for messages.

    >>> describe(int | None), describe(Literal["auto"] | int)
    ('a whole number or nothing (null)', "'auto' or a whole number")
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
        return describe(get_args(annotation)[0])
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def show(value: Any) -> str:
    """A value for messages: its repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(value: Any, annotation: Any) -> str:
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value, [c for c in _choices(annotation) if isinstance(c, str)], n=1, cutoff=0.5)
    return near[0] if near else ""


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _is_field(cls: type, key: str) -> bool:
    return any(field.name == key and field.init for field in dataclasses.fields(cls))


def section_type(annotation: Any) -> type | None:
    """The dataclass in `Section` or `Section | None`; None for other annotations."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    sections = [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]
    return sections[0] if sections else None


def _allows_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)
