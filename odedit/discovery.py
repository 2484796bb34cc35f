"""Finds editors and backbones by their file name: a new one is one new file and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from odedit.errors import InputError, unknown_name

_NOT_PLUGINS = frozenset({"base"})


def names(package: ModuleType) -> tuple[str, ...]:
    """Names of the modules in `package`, sorted, but for its base."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _NOT_PLUGINS))


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
