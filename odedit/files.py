"""Writes that a reader sees whole or not at all, with the mode that the umask gives any new file."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from odedit.errors import InputError


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same folder that no other writer takes.

    Workers of several nodes may write the same file; a process number alone would not tell them apart.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it: there is no moment with half a file."""
    temporary = temporary_beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        # safetensors writes by way of a file of its own, which is readable by its owner alone.
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes a folder, those above it included; where the block fails, those that are still empty go again."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise


def check_new(directory: Path) -> None:
    """Raises InputError if a file, or a folder that holds something, is there already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"--out: {directory} is there already; name a new folder.")


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to be filled in the block, then renamed: there is no moment with half a folder.

    Raises:
        OSError: There is a folder that holds something at `path`, or it cannot be written there.
    """
    temporary = temporary_beside(path)
    with new_folder(path.parent):
        try:
            temporary.mkdir()
            yield temporary
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
