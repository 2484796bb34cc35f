"""Disk cache of computed values, shared by the processes of one user on one machine."""

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
    """The user's cache folder. Its files may be deleted at any time."""
    return Path(tempfile.gettempdir()) / f"odedit-notes-{os.getuid()}"


def once(key: Any, check: Callable[[Any], object], compute: Callable[[], Any]) -> Any:
    """The cached value, or the computed one, which is then cached. Concurrent processes wait for the first to compute.

    If the cache cannot be written, on a full disk for instance, every process computes the value.

    Args:
        key: Everything that the value depends on. Key and value must be JSON-serializable.
        check: Raises ValueError, TypeError or AttributeError for a damaged cached value, which is then replaced.
        compute: Computes the value.
    """
    text = json.dumps(key)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    cache = _private_folder()
    if cache is None:
        return compute()
    path = cache / f"{name}.json"
    with _locked(cache / f"{name}.lock"):
        value = _read(path, text, check)
        if value is None:
            value = compute()
            with suppress(OSError):
                write_atomically(path, lambda file: file.write_text(json.dumps({"key": text, "value": value})))
    return value


def _private_folder() -> Path | None:
    """The cache folder; None if it cannot be created, or if other users have access to it."""
    path = folder()
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return path if is_private else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock in the block; without one if the file system has no locks."""
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


def _read(path: Path, key: str, check: Callable[[Any], object]) -> Any:
    """The cached value; None if it is missing or damaged."""
    try:
        entry = json.loads(path.read_text())
        if entry["key"] != key:
            return None
        check(entry["value"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return entry["value"]
