"""Peak memory of a block of code: the largest number of bytes of its tensors that are alive at once.

On CUDA the caching allocator counts them. On a CPU every operator is intercepted, and the storages of its results are
counted until their last user is freed, tensors saved by autograd included.
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
    """Result of `peak_memory`.

    Attributes:
        bytes: Peak bytes; valid after the block.
    """

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Peak]:
    """Measures the peak memory of a block. On a CPU every operator takes some microseconds longer.

    Args:
        device: Device of the tensors, `cpu` or one CUDA device, whose peak statistics are reset.

    Yields:
        Peak of the block. On CUDA it includes scratch memory of kernels and the allocator's rounding to 512 bytes; on a
        CPU it is exact, without scratch memory and without arrays of NumPy.
    """
    gc.collect()  # garbage of earlier code, freed inside the block, would be subtracted
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
    """Sum of the storages of tensors created inside; a storage counts once however many tensors view it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        # Sizes of storages by address; None for a storage from before the block. An address is reused only after the
        # finalizer has removed it here.
        self._sizes: dict[int, int | None] = {}
        self._finalizers: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.ops.aten.lift_fresh.default:  # its input is the new tensor of `torch.tensor`
            for value in tree_leaves((args, kwargs)):
                self._count(value, is_new=False)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            self._count(value, is_new=True)
        return result

    def close(self) -> None:
        """Detaches the finalizers of all storages that are still alive."""
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()
        self._sizes.clear()

    def _count(self, value: Any, *, is_new: bool) -> None:
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
