"""Exceptions with messages for the user, and the formatting of errors as one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from odedit.runtime.addresses import masked

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt|Warning)(?:: .*)?)$", re.MULTILINE)
"""Last line of a traceback: exception and message, without the module."""
_ANOTHER = "During handling of the above exception, another exception occurred"
"""Python's line between the tracebacks of two chained exceptions."""
_TRACEBACK = ("Traceback (most recent call last)", "ray::")
_LONGEST = 300
_UNEXPLAINED = "no further explanation"


class Explained(Exception):
    """An exception whose message is the whole explanation, written for the user."""


class InputError(Explained, ValueError):
    """Invalid input of the user. Commands print the message and exit with code 2."""


class StorageError(Explained):
    """A storage failed until the retries ended; the file itself may be fine."""


class NothingUsable(Exception):
    """A command ran without error and has no result. Commands print the message and exit with code 1."""


def unknown_name(kind: str, got: str, available: Iterable[str]) -> InputError:
    """An `InputError` for an unknown name, with the nearest valid one.

    >>> print(unknown_name("editor", "wize", ["ftl", "wise"]))
    Unknown editor 'wize'. Did you mean 'wise'? Available: ftl, wise.
    """
    names = sorted(available)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"Unknown {kind} {got!r}.{hint} Available: {', '.join(names)}.")


def cause_of(error: BaseException) -> BaseException:
    """The exception that a worker raised, without Ray's wrappers; any other exception itself."""
    inner = error.__cause__ if _is_wrapper(error) else getattr(error, "cause", None)
    cause = cause_of(inner) if isinstance(inner, BaseException) else None
    # Pickling drops the `__cause__` of a wrapper; the cause is then still in the text of the outer exception.
    return error if cause is None or _is_wrapper(cause) else cause


def _is_wrapper(error: BaseException) -> bool:
    return type(error).__name__ == "UserCodeException"


def one_sentence(error: BaseException) -> str:
    """The cause of an exception on one line, with its type unless it is `Explained`."""
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
    """The first `shown` names, and the number of further ones.

    >>> listed(["a", "b"]), listed(["a", "b", "c", "d"], shown=2)
    ('a, b', 'a, b and 2 more')
    """
    more = len(names) - shown
    return separator.join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def in_words(error: BaseException, most: int = 200) -> str:
    """The message of an error for use inside a sentence: one line, passwords masked, no full stop, cut to `most`."""
    text = masked(" ".join(str(error).split())).rstrip(". ")
    if isinstance(error, KeyError):  # its message is the key alone
        text = f"unknown {text}"
    return (text if len(text) <= most else f"{text[:most]} ...") or type(error).__name__
