"""Atomic writes of local files and folders, with file modes set by the umask."""

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
    """A unique hidden name in the same folder.

    It holds the host name, since workers of several nodes may write the same file.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it to `path`."""
    temporary = temporary_beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        # safetensors replaces the file by one of its own, with mode 600.
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, own: Collection[str] = ()) -> Iterator[None]:
    """Creates a folder and its parents; if the block fails, removes those that it created and that are empty.

    Args:
        own: Names that the block writes into the folder. If the block fails, the new ones are removed, unless the
            folder has other new names as well. The caller must hold a lock, so that no other process writes them.
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
    """Creates a folder and its parents; returns those that this process created, innermost first."""
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
    """Raises InputError if `directory` is a file, a non-empty folder or the current folder."""
    if directory.exists() and (
        not directory.is_dir() or any(directory.iterdir()) or directory.resolve() == Path.cwd().resolve()
    ):
        raise InputError(f"--out: {directory} is there already; name a new folder.")


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` for the block to fill; it is renamed to `path` afterwards.

    Raises:
        OSError: `path` is a non-empty folder, or its parent cannot be written.
    """
    path = path.resolve()  # follows links; "." has no name to build a temporary one from
    temporary = temporary_beside(path)
    with new_folder(path.parent):
        try:
            temporary.mkdir()
            yield temporary
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def link_once(path: Path, text: str) -> None:
    """Writes a file unless it exists. The first of several writers wins."""
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links: a narrow race remains
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
