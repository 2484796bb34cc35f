"""Lock of a folder that one process writes to at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from odedit.errors import InputError
from odedit.storage.location import Location, LocationLike, at
from pipeline.run_folder.workspace import new_local_folder

LOCK = ".lock"
"""File of the lock in a folder; a process that was killed leaves it."""


@contextmanager
def alone(folder: LocationLike, setting: str, holder: str = "a command that writes to") -> Iterator[None]:
    """Holds the lock of a folder inside the block, and creates the folder; the lock ends with the process.

    Args:
        folder: Path or address. The lock of an address keeps out processes of this machine only.
        setting: Name of the setting or option that names the folder, for the message.
        holder: Words before the folder in the message.

    Raises:
        InputError: Another process holds the lock, on this machine or on one that shares the folder.
    """
    location = at(folder, setting)
    with ExitStack() as stack:
        # A folder that cannot be written to is reported by `check_access`; some file systems have no locks.
        with suppress(OSError):
            stack.enter_context(new_local_folder(location))
            stack.enter_context(_locked(_file(location), f"{setting}: {holder} {location}"))
        yield


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    with open(path, "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(stream.fileno()).st_nlink:
                raise BlockingIOError("the process that had the lock has just removed the file")
        except BlockingIOError as error:
            stream.seek(0)
            number = stream.read().strip() or "unknown"
            raise InputError(
                f"{what} is running (process {number}). Wait until it has ended, or choose another folder."
            ) from error
        except OSError:
            path.unlink()
            raise
        try:
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield
        finally:
            with suppress(OSError):  # must not hide why the block ended
                path.unlink()


def _file(folder: Location) -> Path:
    if folder.is_local:
        return Path(folder / LOCK)
    # Two stores may have the same address.
    store = os.environ.get("AWS_ENDPOINT_URL", "")
    return temporary_file(f"{store} {folder}")


def temporary_file(name: str) -> Path:
    """File of this user's lock of that name, for what cannot hold a file of its own."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"odedit-{os.getuid()}-{digest}.lock"
