"""Finds plug-ins (editors, backbones, objectives) by their file name: a new one is one new file and nothing else.

A plug-in is a file in one of these packages, or a dotted module outside of them. `base` holds the contract, and a
sub-package what several plug-ins share.
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
"""Besides packages such as `common`: they hold what plug-ins share."""


def names(package: ModuleType) -> tuple[str, ...]:
    """Names of the plug-ins in `package`, sorted."""
    modules = pkgutil.iter_modules(package.__path__)
    return tuple(sorted(m.name for m in modules if not m.ispkg and m.name not in _NOT_PLUGINS))


def find(package: ModuleType, kind: str, name: str, attribute: str) -> Any:
    """Returns `attribute` of the module called `name`, or of the dotted module outside the package.

    Raises:
        InputError: No such name (the nearest right one is given), or the module lacks the attribute.
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
    """Distributes the settings of a section over the `Config` classes that have them.

    Args:
        own: `Config` of the chosen plug-in.
        others: `Config` of the plug-ins whose settings may stand in the section as well; they get what `own` lacks.

    Returns:
        Each class with its part of the settings, `own` first, and the keys that no class has.
    """
    parts: dict[type, dict[str, Any]] = {}
    taken: set[Any] = set()
    for config_class in dict.fromkeys((own, *others)):
        known = {item.name for item in dataclasses.fields(config_class)}
        fitting = known if config_class is own else known - {item.name for item in dataclasses.fields(own)}
        parts[config_class] = {key: value for key, value in settings.items() if key in fitting}
        taken |= fitting
    return parts, [key for key in settings if key not in taken]
