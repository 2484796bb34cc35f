"""A disk that is really full: a small file system in memory, which only one process has mounted.

Everybody else sees it through that process, so nothing is mounted for the machine, and no rights are needed beyond
those of a user namespace. Where those are not given, the system refuses the process that writes longer files.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_FEW_BYTES = 1024


@dataclass(frozen=True)
class Disk:
    """A place for files.

    Attributes:
        full: Inside the block it returns, there is no room for what a process writes.
        refusal: What the system then says.
    """

    path: Path
    full: Callable[[int], AbstractContextManager[None]]
    refusal: str


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Disk]:
    """A file system of that size, which is gone after the block.

    Args:
        folder: Empty folder that it is mounted over.
    """
    mount = 'mount -t tmpfs -o size="$1" none "$2" && echo mounted && exec cat'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", f"{mebibytes}m", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:  # type: ignore[call-overload]
        try:
            if holder.stdout.readline().strip() == "mounted":
                path = Path(f"/proc/{holder.pid}/root{folder}")
                yield Disk(path, lambda process: _filled(path), "No space left on device")
            else:
                yield Disk(folder, _no_longer_files, "File too large")
        finally:
            holder.stdin.close()  # which ends it


@contextmanager
def _filled(path: Path) -> Iterator[None]:
    """Inside, there is not a byte left."""
    ballast = path / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    assert shutil.disk_usage(path).free == 0
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def _no_longer_files(process: int) -> Iterator[None]:
    """Inside, a process cannot write more than a few bytes to a file."""
    limited = psutil.Process(process)
    before = limited.rlimit(psutil.RLIMIT_FSIZE)
    limited.rlimit(psutil.RLIMIT_FSIZE, (_FEW_BYTES, before[1]))
    try:
        yield
    finally:
        if limited.is_running():
            limited.rlimit(psutil.RLIMIT_FSIZE, before)
