"""Lookup of plug-ins (editors, backbones, objectives) by name.

A plug-in is a module in one of these packages, named by its file, or any importable module, named with dots. `base`
defines the plug-ins' contract; sub-packages hold shared code.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from odedit.errors import InputError, unknown_name

_NOT_PLUGINS = frozenset({"base"})
"""Modules that are no plug-ins, besides sub-packages such as `common`."""


def names(package: ModuleType) -> tuple[str, ...]:
    """Names of the plug-ins in `package`, sorted."""
    modules = pkgutil.iter_modules(package.__path__)
    return tuple(sorted(m.name for m in modules if not m.ispkg and m.name not in _NOT_PLUGINS))


def find(package: ModuleType, kind: str, name: str, attribute: str) -> Any:
    """Returns `attribute` of the plug-in `name`: a module of `package`, or an importable module if it has a dot.

    Raises:
        InputError: The plug-in does not exist, cannot be imported, or lacks the attribute.
    """
    if "." in name:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"{kind} {name!r}: the module cannot be imported ({error}).") from error
    elif name in names(package):
        module = importlib.import_module(f"{package.__name__}.{name}")
    else:
        raise unknown_name(kind, name, names(package))
    if not hasattr(module, attribute):
        raise InputError(f"{kind} {name!r}: module {module.__name__} does not define {attribute}.")
    return getattr(module, attribute)


def by_config(
    settings: Mapping[Any, Any], own: type, others: Iterable[type] = ()
) -> tuple[dict[type, dict[str, Any]], list[Any]]:
    """Distributes the settings of a section over `Config` classes by field name.

    Args:
        own: `Config` of the chosen plug-in.
        others: `Config` classes of other plug-ins whose settings the section may hold; `own` has precedence.

    Returns:
        Settings by class, `own` first, and the keys that no class has.
    """
    parts: dict[type, dict[str, Any]] = {}
    known: set[Any] = set()
    for config_class in dict.fromkeys((own, *others)):
        keys = {item.name for item in dataclasses.fields(config_class)}
        if config_class is not own:
            keys -= {item.name for item in dataclasses.fields(own)}
        parts[config_class] = {key: value for key, value in settings.items() if key in keys}
        known |= keys
    return parts, [key for key in settings if key not in known]
