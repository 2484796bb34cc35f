"""Exceptions whose message is for the user: the input is wrong or out of reach, or nothing could be done with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used. The message is the whole explanation; commands exit with code 2."""


class StorageError(Exception):
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_words(error: BaseException, most: int = 200) -> str:
    """All that an error says, in one line without a full stop, cut where it is long."""
    text = " ".join(str(error).split()).rstrip(". ")
    if isinstance(error, KeyError):  # says the key alone
        text = f"unknown {text}"
    return (text if len(text) <= most else f"{text[:most]} ...") or type(error).__name__
