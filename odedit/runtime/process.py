"""Settings of a process that edits or trains."""

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
"""Limit of older glibc."""
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def settle(num_threads: int, device: str) -> None:
    """Sets the number of CPU threads, deterministic algorithms, and on a CPU the reuse of freed memory.

    Call it before any work on the device.
    """
    torch.set_num_threads(num_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.device(device).type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Makes this process keep up to half a GiB of freed memory, and reuse it for blocks of up to 256 MiB.

    By default glibc returns a large block to the system as soon as it is free, and the system clears each page of a new
    block at its first write. For a tensor of some megabytes that can take as long as the product that fills it, and an
    edit allocates the same tensors in every step.

    Returns:
        Whether the setting was changed: false without glibc, or if the environment configures glibc.
    """
    if platform.libc_ver()[0] != "glibc" or any(map(os.environ.get, _OWN_SETTINGS)):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Setting one threshold ends glibc's adaptation of the other, so both are set.
    takes_large = any(mallopt(_MMAP_THRESHOLD, size) for size in (_LARGEST, _LARGEST_BEFORE_2_35))
    return takes_large and bool(mallopt(_TRIM_THRESHOLD, _KEPT_AT_MOST))
