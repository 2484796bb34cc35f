"""Builds nested frozen dataclasses from a mapping. One error lists every mistake by its path.

The dataclasses do not depend on this file: annotations define the allowed types, and `__post_init__` raises ValueError
for a value out of bounds.
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
    presets = getattr(cls, "PRESETS", {})
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key == "preset" and presets:
            continue
        if key not in hints or not _is_field(cls, key):
            names = [field.name for field in dataclasses.fields(cls)]
            problems.append(unknown_key(where, str(key), [*names, *(["preset"] if presets else [])]))
        elif (section := section_type(hints[key])) is not None and not (value is None and _allows_none(hints[key])):
            accepted[key] = _build(section, value, where, problems)
        else:
            accepted[key] = _scalar(hints[key], value, where, problems)
    if len(problems) > num_before:
        return None
    try:
        return cls.preset(values["preset"], **accepted) if presets and "preset" in values else cls(**accepted)  # type: ignore[attr-defined]
    except ValueError as error:
        problems.append(f"{path}.{error}" if path else str(error))
    except TypeError as error:  # a required field is missing
        problems.append(f"{path or 'configuration'}: {error}")
    return None


def _scalar(annotation: Any, value: Any, where: str, problems: list[str]) -> Any:
    try:
        # pydantic's strict mode for JSON fits YAML: it takes lists for tuples, and no text for booleans.
        return adapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        problems.append(refusal(where, value, annotation))
    return None


def unknown_key(where: str, key: str, allowed: Iterable[str]) -> str:
    """Message for an unknown key, with the most similar allowed key.

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
