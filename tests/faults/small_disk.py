"""A small disk that can be filled: a tmpfs mounted in the user namespace of one process.

Other processes reach it through `/proc/<pid>/root`, so it needs no root and does not change the machine's mounts. Where
user namespaces are forbidden, a limit on file sizes stands in for the full disk.
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
    """A folder that can be made to refuse writes.

    Attributes:
        path: The folder.
        full: Context manager, given a process, inside of which that process cannot write.
        refusal: Message of the operating system in that case.
    """

    path: Path
    full: Callable[[int], AbstractContextManager[None]]
    refusal: str


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Disk]:
    """A file system that exists during the block.

    Args:
        folder: Empty folder to mount it on.
        mebibytes: Size in MiB.
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
            holder.stdin.close()  # ends the process


@contextmanager
def _filled(path: Path) -> Iterator[None]:
    """Leaves no free byte on the disk inside the block."""
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
    """Limits a process inside the block to files of 1 KiB."""
    limited = psutil.Process(process)
    before = limited.rlimit(psutil.RLIMIT_FSIZE)
    limited.rlimit(psutil.RLIMIT_FSIZE, (_FEW_BYTES, before[1]))
    try:
        yield
    finally:
        if limited.is_running():
            limited.rlimit(psutil.RLIMIT_FSIZE, before)
