"""Python's collection of reference cycles, which is rare while a command imports its libraries.

Imports make a million objects and no garbage. With Python's thresholds, looking at them takes a fifth of the time that
the imports take.
"""

from __future__ import annotations

import gc

_BETWEEN = 200_000
"""New objects between two collections during imports."""
_usual = gc.get_threshold()


def collect_rarely() -> None:
    """Makes collections rare, until `collect_as_usual`."""
    gc.set_threshold(_BETWEEN)


def collect_as_usual() -> None:
    """Restores Python's thresholds, since a cycle may hold a large tensor. Present objects are not looked at again."""
    gc.freeze()
    gc.set_threshold(*_usual)


def end() -> None:
    """Leaves out the last collection, which would look at every object of the libraries when the interpreter ends."""
    gc.freeze()
