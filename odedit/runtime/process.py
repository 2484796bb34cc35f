"""Configuration of a process that edits or trains: threads, determinism, allocator."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from odedit.runtime.garbage import collect_as_usual

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of malloc.h; see mallopt(3)."""
_KEPT_AT_MOST = 2**29
_LARGEST = 2**28
_LARGEST_BEFORE_2_35 = 2**25
"""Limit of older glibc."""
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def configure_process(num_threads: int, device: str) -> None:
    """Sets threads, deterministic algorithms, collection of garbage, and on a CPU the reuse of freed memory.

    Call it before any work on the device.
    """
    collect_as_usual()
    torch.set_num_threads(num_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.device(device).type == "cpu":
        keep_freed_memory()


@contextmanager
def restored_process() -> Iterator[None]:
    """Inside, `configure_process` may be called; afterwards threads and determinism are as before."""
    threads, name = torch.get_num_threads(), "CUBLAS_WORKSPACE_CONFIG"
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.get(name)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        if workspace is None:
            os.environ.pop(name, None)


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
