"""The workers that share one task: their number, and means and lists over all of them.

Workers are the processes of torch.distributed's default group. Without one there is a single worker, and every function
returns its argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def _is_shared() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """Number of this worker, from 0."""
    return distributed.get_rank() if _is_shared() else 0


def count() -> int:
    """Number of workers."""
    return distributed.get_world_size() if _is_shared() else 1


def mean(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Mean of each tensor over the workers, in one message."""
    if not _is_shared():
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gathered(value: Any) -> list[Any]:
    """The workers' values, in the order of their numbers; the values are pickled."""
    if not _is_shared():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
