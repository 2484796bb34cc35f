"""Count-sketch: a fixed random linear map from the change of an edit's weights to a few hundred numbers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from odedit.inputs.batch import EditParams
from odedit.risks.risks import upcast
from odedit.runtime.budgets import budgets

MAX_SKETCH_DIM = 2**14
"""Bound of the number of buckets: an int16 stores a bucket index, or an index in a block, and a sign."""

_NORM_FLOOR = 1e-12


class CountSketch:
    """A fixed random linear map of `phi_e - phi_0` to `dim` numbers, followed by each tensor's log-norm.

    Every weight is added, with a random sign, to one bucket. Inner products and distances are preserved on average,
    with a variance of order 1/dim. The map is linear, so lambda is a differentiable function of phi_e, which the
    convergence result (Prop. 4.2 of the paper) requires.

    Differs from the published sketch, which draws a bucket for every weight: each block of dim consecutive weights is
    spread over the dim buckets by its own random permutation. Two weights of a block never share a bucket; two weights
    of different blocks share one with probability 1/dim. The mean is the same and the variance of the same order. Every
    bucket has the same number of weights, so it is computed by gathering: no atomic additions, and a fixed order.

    The hash takes 4 bytes per weight and is shared by all edits. Apart from gradients, neither pass allocates a tensor
    of the size of all edits' weights. The hash is drawn on the CPU from the seed and the tensor's name, so it is the
    same on every device and for every order of the tensors.

    Args:
        sizes: Number of weights in one edit, by name of the tensor.
        dim: Number of buckets.
        seed: Seed of the map; constant over the steps of an edit, or lambda's input would jump.

    Raises:
        ValueError: Empty `sizes`, a size below 1, or a `dim` that int16 cannot index.

    References:
        "Finding Frequent Items in Data Streams", Charikar, Chen and Farach-Colton, 2002; "Feature Hashing for Large
        Scale Multitask Learning", arXiv 0902.2206, lemma 2 for the inner product.
    """

    def __init__(self, sizes: Mapping[str, int], dim: int = 512, seed: int = 0) -> None:
        if not sizes or any(size < 1 for size in sizes.values()):
            raise ValueError(f"sizes: got {dict(sizes)}, expected at least one tensor, each with at least one weight.")
        if not 1 <= dim <= MAX_SKETCH_DIM:
            raise ValueError(f"sketch_dim: got {dim}, expected 1 to {MAX_SKETCH_DIM}.")
        self.sizes = dict(sorted(sizes.items()))
        self.dim = dim
        drawn = {name: _Hash.draw(size, dim, seed, name) for name, size in self.sizes.items()}
        self._hashes = {torch.device("cpu"): drawn}

    def __call__(self, delta: EditParams) -> Tensor:
        """Sketch, then `log |delta_name|` in the order of the names, `(E, dim + number of tensors)`.

        The log-norm is `log(1e-12 + |delta|^2) / 2`: at phi_0, where delta is 0, it is finite and has gradient 0.

        Raises:
            ValueError: Names or sizes other than those that the sketch was made for.
        """
        sizes = {name: tensor[0].numel() for name, tensor in delta.items()}
        if sizes != self.sizes:
            raise ValueError(f"delta: got tensors of sizes {sizes}, but the sketch was made for {self.sizes}.")
        sums, log_norms = [], []
        for name in self.sizes:
            delta_EN = upcast(delta[name]).flatten(1)
            sum_EP, squared_norm_E = _BucketSum.apply(delta_EN, self._on(delta_EN.device)[name])
            sums.append(sum_EP)
            log_norms.append(0.5 * torch.log(_NORM_FLOOR + squared_norm_E))
        return torch.cat([torch.stack(sums).sum(0), torch.stack(log_norms, dim=-1)], dim=-1)

    def _on(self, device: torch.device) -> dict[str, _Hash]:
        if device not in self._hashes:
            drawn = self._hashes[torch.device("cpu")]
            self._hashes[device] = {name: _Hash(*(table.to(device) for table in hash)) for name, hash in drawn.items()}
        return self._hashes[device]


class _Hash(NamedTuple):
    """Permutation of every block and its inverse; dim is added to an entry whose sign is negative.

    Attributes:
        bucket_BP: Bucket of each weight of a block, `(blocks, dim)` int16.
        weight_BP: Index in the block of each bucket's weight, `(blocks, dim)` int16.
    """

    bucket_BP: Tensor
    weight_BP: Tensor

    @classmethod
    def draw(cls, size: int, dim: int, seed: int, name: str) -> _Hash:
        # The CPU generator uses only 32 bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        # Drawn block by block, so that an edit padded to a longer one has the same sketch.
        drawn_B2P = torch.rand(-(-size // dim), 2, dim, generator=generator)
        weight_BP = drawn_B2P[:, 0].argsort(dim=-1)
        negative_BP = (drawn_B2P[:, 1] < 0.5).long() * dim
        bucket_BP = torch.empty_like(weight_BP).scatter_(1, weight_BP, torch.arange(dim).expand_as(weight_BP))
        signed_BP = weight_BP + negative_BP.gather(1, weight_BP)
        return cls((bucket_BP + negative_BP).to(torch.int16), signed_BP.to(torch.int16))


class _BucketSum(torch.autograd.Function):
    """Sum of `sign[i] x[e, i]` over the weights i of each bucket, `(E, dim)`, and `|x[e]|^2`, `(E,)`.

    Both passes run in parts of some blocks. Plain autograd would save an int64 index, eight bytes per weight, for the
    backward pass, and read the weights twice as often.
    """

    @staticmethod
    def forward(ctx: Any, x_EN: Tensor, hash: _Hash) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_EN)
        ctx.hash = hash
        dim = hash.weight_BP.shape[1]
        out_EP, squared_E = x_EN.new_zeros(len(x_EN), dim), x_EN.new_zeros(len(x_EN))
        for part, blocks in _parts(x_EN, hash):
            weight_1BP = hash.weight_BP[blocks].unsqueeze(0)
            index_1BP, sign_1BP = (weight_1BP % dim).long(), 1 - 2 * (weight_1BP >= dim).to(torch.int8)
            x_EBP = _whole_blocks(x_EN[:, part], dim)
            out_EP += x_EBP.gather(2, index_1BP.expand(len(x_EBP), -1, -1)).mul_(sign_1BP).sum(1)
            squared_E += torch.linalg.vector_norm(x_EN[:, part], dim=1).square()
        return out_EP, squared_E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_EP, grad_E = grads
        (x_EN,) = ctx.saved_tensors
        both_EC = torch.cat([grad_EP, -grad_EP], dim=1)
        twice_E1 = 2 * grad_E.unsqueeze(1)
        grad_EN = torch.empty_like(x_EN)
        for part, blocks in _parts(x_EN, ctx.hash):
            x_EM = x_EN[:, part]
            cells_M = ctx.hash.bucket_BP[blocks].flatten()[: x_EM.shape[1]]
            grad_EN[:, part] = both_EC.index_select(1, cells_M.int()).addcmul(x_EM, twice_E1)
        return grad_EN, None


def _parts(x_EN: Tensor, hash: _Hash) -> Iterator[tuple[slice, slice]]:
    """Slice of weights and slice of blocks of each part."""
    num_blocks, dim = hash.weight_BP.shape
    at_once = budgets(x_EN.device).sketched_weights
    step = max(1, at_once // (dim * len(x_EN)))
    for start in range(0, num_blocks, step):
        yield slice(start * dim, (start + step) * dim), slice(start, start + step)


def _whole_blocks(x_EM: Tensor, dim: int) -> Tensor:
    """Weights as `(E, blocks, dim)`, the last block padded with zeros."""
    missing = -x_EM.shape[1] % dim
    return (functional.pad(x_EM, (0, missing)) if missing else x_EM).unflatten(1, (-1, dim))
