"""Results of long computations, kept for other processes of the same user on the same machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from odedit.storage.atomic import write_atomically


def folder() -> Path:
    """The user's own folder for notes; everything in it may be deleted at any time."""
    return Path(tempfile.gettempdir()) / f"odedit-notes-{os.getuid()}"


def once(key: Any, check: Callable[[Any], object], compute: Callable[[], Any]) -> Any:
    """The computed value, which of several processes at once only the first computes.

    Where notes cannot be kept, such as on a full disk, every process computes it.

    Args:
        key: What the value depends on. Like the value it consists of what JSON knows.
        check: Raises ValueError, TypeError or AttributeError for kept notes that are damaged; then they are replaced.
        compute: Makes the value.
    """
    text = json.dumps(key)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    place = _private_folder()
    if place is None:
        return compute()
    path = place / f"{name}.json"
    with _locked(place / f"{name}.lock"):
        value = _kept(path, text, check)
        if value is None:
            value = compute()
            with suppress(OSError):
                write_atomically(path, lambda file: file.write_text(json.dumps({"key": text, "value": value})))
    return value


def _private_folder() -> Path | None:
    """None where there is no folder that the user alone can write to."""
    place = folder()
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError:
        return None
    is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return place if is_private else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, no other process has the lock. Without locks on the file system, as if it had been free."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _kept(path: Path, key: str, check: Callable[[Any], object]) -> Any:
    """The kept value; None if there is none, or a damaged one."""
    try:
        notes = json.loads(path.read_text())
        if notes["key"] != key:
            return None
        check(notes["value"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return notes["value"]
