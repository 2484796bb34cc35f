"""Exceptions whose message is for the user, and what is said of all others: one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from odedit.runtime.addresses import masked

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt|Warning)(?:: .*)?)$", re.MULTILINE)
"""Last line of a traceback: exception and message, without the module."""
_ANOTHER = "During handling of the above exception, another exception occurred"
"""Between the tracebacks of an exception that was not passed on and of the one that was raised instead."""
_TRACEBACK = ("Traceback (most recent call last)", "ray::")
_LONGEST = 300
_UNEXPLAINED = "no further explanation"


class Explained(Exception):
    """An exception whose message is the whole explanation, written for the user."""


class InputError(Explained, ValueError):
    """What the user gave cannot be used. The message is the whole explanation; commands exit with code 2."""


class StorageError(Explained):
    """Something cannot be read because its storage refuses, not because it is wrong: it may work later."""


class NothingUsable(Exception):
    """A command ran as it should and nothing came of it. The message says so; commands exit with code 1."""


def unknown_name(kind: str, got: str, available: Iterable[str]) -> InputError:
    """An `InputError` for a misspelt name, with the nearest right one.

    >>> print(unknown_name("editor", "wize", ["ftl", "wise"]))
    Unknown editor 'wize'. Did you mean 'wise'? Available: ftl, wise.
    """
    names = sorted(available)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"Unknown {kind} {got!r}.{hint} Available: {', '.join(names)}.")


def cause_of(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of what Ray wraps it in; any other exception itself."""
    inner = error.__cause__ if _is_wrapper(error) else getattr(error, "cause", None)
    found = cause_of(inner) if isinstance(inner, BaseException) else None
    # A wrapper that came from another process has lost its cause, which is still in the outer exception's text.
    return error if found is None or _is_wrapper(found) else found


def _is_wrapper(error: BaseException) -> bool:
    return type(error).__name__ == "UserCodeException"


def one_sentence(error: BaseException) -> str:
    """An exception on one line, its kind included unless it is `Explained`; of a wrapped one, the cause."""
    error = cause_of(error)
    text = masked(_COLOURS.sub("", str(error)))
    if any(mark in text for mark in _TRACEBACK) and (raised := _RAISED.search(text.rpartition(_ANOTHER)[2])):
        return raised[1][:_LONGEST]
    text = " ".join(text.split())
    return text if isinstance(error, Explained) else f"{type(error).__name__}: {text[:_LONGEST] or _UNEXPLAINED}"


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "usable record"), counted(0, "edit")
    ('1 usable record', '0 edits')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(names: Sequence[str], shown: int = 3, separator: str = ", ") -> str:
    """The first of some names, and how many more there are.

    >>> listed(["a", "b"]), listed(["a", "b", "c", "d"], shown=2)
    ('a, b', 'a, b and 2 more')
    """
    more = len(names) - shown
    return separator.join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def in_words(error: BaseException, most: int = 200) -> str:
    """The message of an error as part of a sentence: one line without secrets or full stop, cut where it is long."""
    text = masked(" ".join(str(error).split())).rstrip(". ")
    if isinstance(error, KeyError):  # says the key alone
        text = f"unknown {text}"
    return (text if len(text) <= most else f"{text[:most]} ...") or type(error).__name__
