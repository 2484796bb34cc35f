"""The peak memory of a piece of work: how many bytes of tensors were alive at once beyond those that were there before.

On CUDA the caching allocator keeps count. On a CPU nothing does, so every operator is watched: what memory its results
hold, and when the last user of that memory is gone, tensors that autograd has saved included.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """What `peak_memory` found.

    Attributes:
        bytes: The largest number of bytes at once; valid after the block.
    """

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Peak]:
    """Measures the block inside; numbers do not change, time does on a CPU (some microseconds per operator).

    Args:
        device: Of the tensors; `cpu` or one CUDA device, whose peak statistics are reset.

    Yields:
        What the block held at most. On CUDA sizes are as the allocator rounds them (512 bytes), and scratch memory of
        kernels is included; on a CPU they are exact, without such scratch memory and without what only NumPy knows.
    """
    gc.collect()  # garbage of earlier work must not be freed, and so counted, in here
    measure = _cuda_peak if torch.device(device).type == "cuda" else _cpu_peak
    with measure(torch.device(device)) as peak:
        yield peak


@contextmanager
def _cuda_peak(device: torch.device) -> Iterator[Peak]:
    peak = Peak()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        yield peak
    finally:
        peak.bytes = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _cpu_peak(device: torch.device) -> Iterator[Peak]:
    peak, account = Peak(), _Account()
    try:
        with account:
            yield peak
    finally:
        peak.bytes = account.peak
        account.close()


class _Account(TorchDispatchMode):
    """Adds up the storages of tensors made while it is entered, each once however many tensors view it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        # Address of a storage to its size; None for one that was there before. An address is taken again only after
        # its finalizer has run, which removes it here.
        self._sizes: dict[int, int | None] = {}
        self._finalizers: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.ops.aten.lift_fresh.default:  # its input is the new tensor of `torch.tensor`
            for value in tree_leaves((args, kwargs)):
                self._see(value, is_new=False)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            self._see(value, is_new=True)
        return result

    def close(self) -> None:
        """Forgets all storages; those that live on no longer report here."""
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()
        self._sizes.clear()

    def _see(self, value: Any, *, is_new: bool) -> None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        address: int = storage._cdata
        if address not in self._sizes:
            self._finalizers[address] = finalizer = weakref.finalize(storage, self._forget, address)
            finalizer.atexit = False
            self._sizes[address] = 0 if is_new else None
        known = self._sizes[address]
        if known is not None:
            size = storage.nbytes()  # it may have grown since
            self._alive += size - known
            self._sizes[address] = size
            self.peak = max(self.peak, self._alive)

    def _forget(self, address: int) -> None:
        self._alive -= self._sizes.pop(address) or 0
        del self._finalizers[address]
