"""Width of the loop: how many edits of a group run at once, by free memory; the others wait for a free slot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch

from pipeline.config.run import AUTO

_SHARE_OF_FREE = 0.5
"""Share of free memory given to the loop; the rest is for waiting edits' prefixes, evaluation and fragmentation."""
_CGROUP = Path("/sys/fs/cgroup")


class WidthLimit:
    """The largest width of one worker; it stays reduced after memory has run out.

    Args:
        at_once: Width that `pipeline.at_once` sets, or "auto".
        device: Device of the model.
        share: Share of the device's memory that belongs to this worker.
    """

    def __init__(self, at_once: Literal["auto"] | int, device: str, share: float = 1.0) -> None:
        self._limit = None if at_once == AUTO else int(at_once)
        self._initial: int | None = self._limit
        self._device, self._share = torch.device(device), share

    def width(self, num_edits: int, bytes_per_edit: Callable[[], int]) -> int:
        """Number of edits that run at once, at most `num_edits`.

        Args:
            bytes_per_edit: Measures the peak bytes of one edit; called once, and not for a single edit.
        """
        if num_edits == 1:
            return 1
        if self._limit is None:
            self._limit = self._initial = max(
                1, int(self._share * _SHARE_OF_FREE * free_bytes(self._device) / max(bytes_per_edit(), 1))
            )
        return min(self._limit, num_edits)

    def halve(self, num_edits: int) -> bool:
        """Halves the width that `num_edits` edits have; False if it is 1 already."""
        width = num_edits if self._limit is None else min(self._limit, num_edits)
        if width == 1:
            return False
        self._limit = width // 2
        return True

    def restore(self) -> None:
        """Sets the limit that it had before the first `halve`."""
        self._limit = self._initial


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of this machine or container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    free = psutil.virtual_memory().available
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if used is not None:
        used -= _page_cache()
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _page_cache() -> int:
    """Bytes of the container's page cache, which counts as used although it is given up when memory is needed."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return sum(int(values.get(name, 0)) for name in ("active_file", "inactive_file"))


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or it sets no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
