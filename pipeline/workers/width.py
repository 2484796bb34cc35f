"""How many edits of a group move together: as many as the free memory holds; the others wait for their places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch

from pipeline.config.run import AUTO

_SHARE_OF_FREE = 0.5
"""Left are the prefixes of the edits that wait, the evaluation, and what an allocator cannot use."""
_CGROUP = Path("/sys/fs/cgroup")


class Room:
    """Of one worker; becomes narrower when memory runs out, and stays so.

    Args:
        at_once: `pipeline.at_once`.
        share: Of the device's memory that is this worker's.
    """

    def __init__(self, at_once: Literal["auto"] | int, device: str, share: float = 1.0) -> None:
        self._limit = None if at_once == AUTO else int(at_once)
        self._before: int | None = self._limit
        self._device, self._share = torch.device(device), share

    def width(self, num_edits: int, bytes_of_one: Callable[[], int]) -> int:
        """Edits that move together of so many.

        Args:
            bytes_of_one: Measures what an edit holds while it moves; asked once, and not for a single edit.
        """
        if num_edits == 1:
            return 1
        if self._limit is None:
            self._limit = self._before = max(
                1, int(self._share * _SHARE_OF_FREE * free_bytes(self._device) / max(bytes_of_one(), 1))
            )
        return min(self._limit, num_edits)

    def narrower(self, num_edits: int) -> bool:
        """Halves the width that so many edits have; False if it is 1 already."""
        width = num_edits if self._limit is None else min(self._limit, num_edits)
        if width == 1:
            return False
        self._limit = width // 2
        return True

    def restore(self) -> None:
        """Takes back what `narrower` has done: it did not help."""
        self._limit = self._before


def free_bytes(device: torch.device) -> int:
    """Memory that further tensors can take: of a GPU, or of this machine or container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    free = psutil.virtual_memory().available
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if used is not None:
        used -= _file_cache()
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _file_cache() -> int:
    """Bytes of files that are kept only while nobody needs the room, which count as used."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return sum(int(values.get(name, 0)) for name in ("active_file", "inactive_file"))


def _number(path: Path) -> int | None:
    """None where there is no such limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
