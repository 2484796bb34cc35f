"""Python's collection of reference cycles, which is rare while a command imports its libraries.

Imports make a million objects and no garbage. With Python's thresholds, looking at them takes a fifth of the time that
the imports take.
"""

from __future__ import annotations

import gc

_BETWEEN = 200_000
"""New objects between two collections during imports."""
_usual: tuple[int, int, int] | None = None
"""Thresholds before `collect_rarely`; None: they hold."""


def collect_rarely() -> None:
    """Makes collections rare, until `collect_as_usual`."""
    global _usual
    _usual = gc.get_threshold()
    gc.set_threshold(_BETWEEN)


def collect_as_usual() -> None:
    """Restores the thresholds after `collect_rarely`, since a cycle may hold a large tensor; else does nothing.

    The objects of the libraries are not looked at again.
    """
    global _usual
    if _usual is not None:
        gc.freeze()
        gc.set_threshold(*_usual)
        _usual = None


def end() -> None:
    """Leaves out the last collection, which would look at every object of the libraries when the interpreter ends."""
    gc.freeze()
