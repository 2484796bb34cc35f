"""From a mapping to nested frozen dataclasses, strictly: every mistake is found, named by its path and explained.

The dataclasses know nothing of this file: their annotations say what is allowed, their defaults live beside their
docstrings, and a `ValueError` of their `__post_init__` is their own opinion on a value.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from odedit.errors import InputError
from odedit.settings import adapter, refusal, section_type, show


def build(cls: type, values: Any, path: str = "") -> Any:
    """Builds the dataclass `cls` from `values`; keys that are not there keep their defaults.

    Args:
        cls: A dataclass; fields may be dataclasses again.
        values: What a YAML section holds: a mapping, or nothing.
        path: Dotted name of the section, for messages.

    Raises:
        InputError: One line per mistake, all of them at once.
    """
    problems: list[str] = []
    built = _build(cls, values, path, problems)
    raise_problems(problems)
    return built


def raise_problems(problems: Iterable[str]) -> None:
    """Raises one InputError with a line per problem, if there is any."""
    lines = list(problems)
    if lines:
        # A lone surrogate, which YAML can write, cannot be printed.
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
        # Through JSON, because pydantic's strict mode for JSON is the one that fits YAML: lists for tuples, no 'yes'.
        return adapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        problems.append(refusal(where, value, annotation))
    return None


def unknown_key(where: str, key: str, allowed: Iterable[str]) -> str:
    """The message for a key that is not there, with the nearest one that is.

    >>> unknown_key("pipeline.actor", "actor", ["actors", "batch_size"])
    "pipeline.actor: unknown key. Did you mean 'actors'? Allowed: actors, batch_size."
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{where}: unknown key.{hint} Allowed: {', '.join(names)}."


def _is_field(cls: type, key: str) -> bool:
    return any(field.name == key and field.init for field in dataclasses.fields(cls))


def _allows_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)
