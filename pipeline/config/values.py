"""Settings as plain values: under dotted names, and without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from odedit.runtime.addresses import masked


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names.

    >>> flatten({"editor": {"name": "wise"}, "seed": 0})
    {'editor.name': 'wise', 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def masked_values(value: Any) -> Any:
    """A copy of nested lists and mappings with `masked` applied to every text."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: masked_values(item) for key, item in value.items()}
    return [masked_values(item) for item in value] if isinstance(value, list) else value
