"""Gather and scatter by index, with gradients that are gathers too: no atomic adds, deterministic on GPUs.

The library's gradients of `gather`, `index_select` and `index_copy` add up at the indices. Where results must be
reproducible, a GPU sorts the indices first, which takes about twenty kernels and, with many entries, longer than the
rest of a step. Here the inverse index is known beforehand, so both directions are lookups.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def gather_positions(hidden_EKSD: Tensor, positions_EKT: Tensor) -> Tensor:
    """Hidden states at given positions, `(E, K, T, D)`; from `(R, S, D)` at `(R, T)`, `(R, T, D)`."""
    return cast(Tensor, _AtPositions.apply(hidden_EKSD, positions_EKT))


def inverse_index(index_M: Tensor, length: int) -> Tensor:
    """Index into `index_M` of each number below `length`, `(length,)`; M for a number that is not in it.

    Args:
        index_M: Distinct numbers.
    """
    inverse_N = torch.full((length,), len(index_M), dtype=index_M.dtype, device=index_M.device)
    return inverse_N.index_copy_(0, index_M, torch.arange(len(index_M), dtype=index_M.dtype, device=index_M.device))


def select(x: Tensor, dim: int, index_M: Tensor, inverse_N: Tensor) -> Tensor:
    """`x.index_select(dim, index_M)` of distinct indices.

    Args:
        inverse_N: `inverse_index(index_M, N)`.
    """
    return cast(Tensor, _Lookup.apply(x, dim, index_M, inverse_N, None))


def spread(values_M: Tensor, index_M: Tensor, inverse_N: Tensor, elsewhere: float = 0.0) -> Tensor:
    """The inverse of `select` along the last axis: `(..., M)` scattered to `(..., N)`, filled with `elsewhere`."""
    return cast(Tensor, _Lookup.apply(values_M, values_M.dim() - 1, inverse_N, index_M, elsewhere))


class _AtPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.length = hidden.shape[-2]
        return hidden.gather(-2, positions.unsqueeze(-1).expand(*positions.shape, hidden.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (positions,), (grad,) = ctx.saved_tensors, grads
        # Positions of padding may repeat; a matrix product adds their gradients.
        is_at = positions.unsqueeze(-2) == torch.arange(ctx.length, device=positions.device).unsqueeze(-1)
        return is_at.to(grad.dtype) @ grad, None


class _Lookup(torch.autograd.Function):
    """Lookup by `index`, whose gradient is a lookup by `inverse`.

    With `fill`, `index` may contain the number past the end, which yields `fill`; without it, `inverse` may.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor, inverse: Tensor, fill: float | None) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim, ctx.is_filled = dim, fill is not None
        return (x if fill is None else _with_one_more(x, dim, fill)).index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inverse,), (grad,) = ctx.saved_tensors, grads
        grad = grad if ctx.is_filled else _with_one_more(grad, ctx.dim, 0.0)
        return grad.index_select(ctx.dim, inverse), None, None, None, None


def _with_one_more(x: Tensor, dim: int, value: float) -> Tensor:
    """`x` with one more entry of `value` at the end of an axis."""
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_full(shape, value)], dim=dim)
