"""A disk that is really full: a small file system in memory, which only one process has mounted.

Everybody else sees it through that process, so nothing is mounted for the machine, and no rights are needed beyond
those of a user namespace.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A path on a file system of that size, which is gone after the block.

    Args:
        folder: Empty folder that it is mounted over.
    """
    mount = 'mount -t tmpfs -o size="$1" none "$2" && echo mounted && exec cat'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", f"{mebibytes}m", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:  # type: ignore[call-overload]
        try:
            if holder.stdout.readline().strip() != "mounted":
                raise RuntimeError(f"No small disk can be mounted here: {holder.stderr.read().strip()}")
            yield Path(f"/proc/{holder.pid}/root{folder}")
        finally:
            holder.stdin.close()  # which ends it


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Inside, there is not a byte left on the disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    assert shutil.disk_usage(disk).free == 0
    try:
        yield
    finally:
        ballast.unlink()
