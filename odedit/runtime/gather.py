"""Picking entries by their numbers, with gradients that add nothing up at numbered places.

The library's own gradients of `gather`, `index_select` and `index_copy` do that; and where results have to be the same
every time, a GPU sorts the numbers first, which takes some twenty kernels, and longer than everything else in a step
where the entries are many. Here both ways are a lookup: what is picked, and, known beforehand, where each entry went.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def gather_positions(hidden_EKSD: Tensor, positions_EKT: Tensor) -> Tensor:
    """Hidden states at chosen positions, `(E, K, T, D)`; of `(R, S, D)` at `(R, T)`, `(R, T, D)`."""
    return cast(Tensor, _AtPositions.apply(hidden_EKSD, positions_EKT))


def places_of(index_M: Tensor, length: int) -> Tensor:
    """Where each of `length` numbers stands in `index_M`, which has none twice; M for a number that it has not."""
    back_N = torch.full((length,), len(index_M), dtype=index_M.dtype, device=index_M.device)
    return back_N.index_copy_(0, index_M, torch.arange(len(index_M), dtype=index_M.dtype, device=index_M.device))


def select(x: Tensor, dim: int, index_M: Tensor, back_N: Tensor) -> Tensor:
    """`x.index_select(dim, index_M)` of different numbers.

    Args:
        back_N: `places_of(index_M, N)`.
    """
    return cast(Tensor, _Moved.apply(x, dim, index_M, back_N, None))


def spread(values_M: Tensor, index_M: Tensor, back_N: Tensor, elsewhere: float = 0.0) -> Tensor:
    """The inverse, along the last axis: `(..., M)` where they belong among `(..., N)`."""
    return cast(Tensor, _Moved.apply(values_M, values_M.dim() - 1, back_N, index_M, elsewhere))


class _AtPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.length = hidden.shape[-2]
        return hidden.gather(-2, positions.unsqueeze(-1).expand(*positions.shape, hidden.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (positions,), (grad,) = ctx.saved_tensors, grads
        # Positions of padding may be the same: a product adds them up.
        is_at = positions.unsqueeze(-2) == torch.arange(ctx.length, device=positions.device).unsqueeze(-1)
        return is_at.to(grad.dtype) @ grad, None


class _Moved(torch.autograd.Function):
    """Lookup by `there`; a number past the end finds `fill`, unless that is None: then there is no such number, and it
    is `back` that has them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, there: Tensor, back: Tensor, fill: float | None) -> Tensor:
        ctx.save_for_backward(back)
        ctx.dim, ctx.is_filled = dim, fill is not None
        return (x if fill is None else _with_one_more(x, dim, fill)).index_select(dim, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (back,), (grad,) = ctx.saved_tensors, grads
        grad = grad if ctx.is_filled else _with_one_more(grad, ctx.dim, 0.0)
        return grad.index_select(ctx.dim, back), None, None, None, None


def _with_one_more(x: Tensor, dim: int, value: float) -> Tensor:
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_full(shape, value)], dim=dim)
