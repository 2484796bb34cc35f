"""Errors of a device: memory that runs out, and a GPU that the process can no longer use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from odedit.runtime import cuda_graphs

_OUT_OF_MEMORY = ("can't allocate memory", "cuda error: out of memory", "cublas_status_alloc_failed")


def unless_out_of_memory(work: Callable[[], list[Any]], num_edits: int) -> list[Any] | None:
    """Calls `work`, which processes `num_edits` edits.

    Returns:
        The result of `work`; None if memory ran out and fewer edits may fit.

    Raises:
        RuntimeError: Memory ran out for a single edit, or `work` failed for another reason.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # A recorded CUDA graph holds the memory of a step, so the first retry runs without it.
        is_last_try = not cuda_graphs.forget()
        if is_last_try and num_edits == 1:
            raise
    # Outside the handler, since the error's traceback keeps the tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None if is_last_try else unless_out_of_memory(work, num_edits)


class DeviceLost(BaseException):
    """A CUDA error after which the process cannot use the GPU; handlers of an edit's errors do not see it."""


_is_own_process = False


@contextmanager
def in_own_process() -> Iterator[None]:
    """Inside, a lost GPU raises `DeviceLost` instead of ending the process, which is the command's own."""
    global _is_own_process
    before, _is_own_process = _is_own_process, True
    try:
        yield
    finally:
        _is_own_process = before


def end_if_device_is_lost(error: BaseException) -> None:
    """Ends this process after a CUDA error that makes every further call fail.

    Ray hands the group to a new worker, whose ledger finds the edit that caused the error.

    Raises:
        DeviceLost: The process is the command's own.
    """
    if "cuda error" in str(error).lower() and not _is_out_of_memory(error):
        if _is_own_process:
            raise DeviceLost(str(error)) from error
        os._exit(1)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in text for part in _OUT_OF_MEMORY)
