"""Writes that a reader sees whole or not at all."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same folder that no other writer takes.

    Workers of several nodes may write the same file; a process number alone would not tell them apart.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it: there is no moment with half a file."""
    temporary = temporary_beside(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_once(path: Path, text: str) -> None:
    """Writes a file unless it is there; of several writers at once the first wins, and all read the same afterwards."""
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # no hard links on this file system: the narrow race that is left does no harm
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
