"""Ways of committing the records of a run to one model, one file each, found by name."""

from __future__ import annotations

import sys

from odedit import plugins
from odedit.ways.base import Way

__all__ = ["DEFAULT", "Way", "find", "names"]

DEFAULT = "joint"
"""Way of a run without `commit.way`."""


def names() -> tuple[str, ...]:
    """Names of the ways in this folder, sorted."""
    return plugins.names(sys.modules[__name__])


def find(name: str) -> type[Way]:
    """Class of a way: a file of this folder, or a dotted module. Raises InputError for an unknown name."""
    way: type[Way] = plugins.find(sys.modules[__name__], "way", name, "WAY")
    return way
