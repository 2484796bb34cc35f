"""How a process is set up that edits or trains."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of malloc.h; see mallopt(3)."""
_KEPT_AT_MOST = 2**29
_LARGEST = 2**28
_LARGEST_BEFORE_2_35 = 2**25
"""Older glibc refuses more."""
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def settle(num_threads: int, device: str) -> None:
    """Threads of a CPU, the same results every time, and on a CPU memory that stays at hand.

    To be called before any work on the device.
    """
    torch.set_num_threads(num_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It finds reads of what was never written, at the cost of a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.device(device).type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """From now on this process keeps up to half a GiB that it has freed, and blocks of up to 256 MiB come from there.

    Left to itself, glibc returns a large block to the system as soon as it is free and asks for new pages the next
    time, which the system clears one by one when they are first written. For a tensor of some megabytes that can take
    as long as the product that fills it, and an edit makes the same tensors in every step.

    Returns:
        Whether it does: not without glibc, and not where the environment says how glibc is to go about it.
    """
    if platform.libc_ver()[0] != "glibc" or any(map(os.environ.get, _OWN_SETTINGS)):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Setting either ends glibc's own adaptation of the other: all or nothing.
    takes_large = any(mallopt(_MMAP_THRESHOLD, size) for size in (_LARGEST, _LARGEST_BEFORE_2_35))
    return takes_large and bool(mallopt(_TRIM_THRESHOLD, _KEPT_AT_MOST))
