"""Gather and scatter by index, against the library's functions and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from odedit.runtime.gather import gather_positions, inverse_index, select, spread


def _gradient(output: Tensor, x: Tensor, seed: int = 1) -> Tensor:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    return torch.autograd.grad((output * weight).sum(), x)[0]


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_select_is_index_select(dim: int) -> None:
    x = _leaf(4, 5, 6)
    index = torch.tensor([3, 0, 2])
    ours, theirs = select(x, dim, index, inverse_index(index, x.shape[dim])), x.index_select(dim, index)
    assert torch.equal(ours, theirs)
    assert torch.equal(_gradient(ours, x), _gradient(theirs, x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_spread_is_index_copy(dtype: torch.dtype) -> None:
    values, index = _leaf(2, 3), torch.tensor([4, 1, 6])
    ours = spread(values, index, inverse_index(index, 8).to(dtype), -2.0)
    theirs = torch.full((2, 8), -2.0, dtype=torch.float64).index_copy(1, index, values)
    assert torch.equal(ours, theirs)
    assert torch.equal(_gradient(ours, values), _gradient(theirs, values))


def test_an_empty_index() -> None:
    x, index = _leaf(3, 2), torch.zeros(0, dtype=torch.int64)
    inverse = inverse_index(index, 3)
    selected = select(x, 0, index, inverse)
    assert selected.shape == (0, 2)
    assert not _gradient(selected, x).any()
    assert torch.equal(spread(selected[:, 0], index, inverse, 7.0), torch.full((3,), 7.0, dtype=torch.float64))


def test_gradients_of_repeated_positions_add_up() -> None:
    x, positions = _leaf(2, 3, 7, 4), torch.tensor([5, 0, 0, 2]).expand(2, 3, 4)
    ours = gather_positions(x, positions)
    theirs = x.gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, 4))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(_gradient(ours, x), _gradient(theirs, x), rtol=1e-14, atol=0)


def test_second_derivatives() -> None:
    x, index = _leaf(5, 2), torch.tensor([1, 4])
    inverse, positions = inverse_index(index, 5), torch.tensor([[1, 1, 3]])
    assert torch.autograd.gradgradcheck(lambda x: select(x, 0, index, inverse) ** 3, x)
    assert torch.autograd.gradgradcheck(lambda x: spread(x[:2, 0], index, inverse, 1.0) ** 3, x)
    assert torch.autograd.gradgradcheck(lambda x: gather_positions(x.unsqueeze(0), positions) ** 3, x)
