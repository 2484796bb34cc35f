"""Writes that a reader sees whole or not at all, with the mode that the umask gives any new file."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterator
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
def new_folder(path: Path, own: Collection[str] = ()) -> Iterator[None]:
    """Makes a folder and its parents; if the block fails, removes those of them that it made and that are empty.

    Args:
        own: Names of what the block writes into the folder. If the block fails, those that are new are removed, unless
            the folder has other new names by then. No other process may write them: hold a lock.
    """
    made = _made_with_parents(path)
    before = set(os.listdir(path)) if own else set()
    try:
        yield
    except BaseException:
        new = set(os.listdir(path)) - before if own else set()
        for name in new if new <= set(own) else ():
            _remove(path / name)
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise


def _made_with_parents(path: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that no other process has made, the innermost first."""
    made: list[Path] = []
    for folder in [folder for folder in (path, *path.parents) if not folder.exists()][::-1]:
        try:
            folder.mkdir()
            made.insert(0, folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
    if not path.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    return made


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_new(directory: Path) -> None:
    """Raises InputError if a file, or a folder that holds something, is there already; or if it is the current one."""
    if directory.exists() and (
        not directory.is_dir() or any(directory.iterdir()) or directory.resolve() == Path.cwd().resolve()
    ):
        raise InputError(f"--out: {directory} is there already; name a new folder.")


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to be filled in the block, then renamed: there is no moment with half a folder.

    Raises:
        OSError: There is a folder that holds something at `path`, or it cannot be written there.
    """
    path = path.resolve()  # of a link, the folder that it names; "." has no name of its own
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
