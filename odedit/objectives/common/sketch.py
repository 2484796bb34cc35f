"""The invariance penalty, its schedule, and the adaptive multiplier lambda(delta, phi_e).

    G(delta, phi_e) = R_rel + R_loc + R_gen + lambda(delta, phi_e) * ( sum_env |g_env| )^2

`phi_e` descends on G, `delta` ascends. Everything here is a pure function of tensors whose axis 0 is the edit: each
edit has its own multiplier network, and its result does not depend on which edits share its batch.

References:
    arXiv 2601.19700, eq. 9-13; "Invariant Risk Minimization Is A Total Variation Model" (Lai and Wang, ICML 2024)
    and its out-of-distribution extension (Wang, Lai and Zhong, ICLR 2025) for the primal-dual multiplier.
Differs from the paper:
    Its multiplier reads every trainable weight, flattened. That is `input="flat"`; the default is a count-sketch of
    the change of the weights, because a dense first layer on 26 million weights takes gigabytes per copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from odedit.edits import EditParams
from odedit.risks import upcast

MAX_SKETCH_DIM = 2**14
"""A bucket, or a place in a block, and a sign are stored as one int16."""

DUAL_DECAY = 1.0001
"""The power of `k + 1` by which the rate of dual step k is divided, as in the IRM-TV code."""

_SKETCHED_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Weights of all edits that are sorted into buckets together: what stays in a core's cache, or keeps a GPU busy."""
_NORM_FLOOR = 1e-12
_LAST_LAYER_SCALE = 0.01

MultiplierInput = Literal["sketch", "flat"]


def tv_penalty(scale_gradients: Sequence[Tensor] | Tensor, present_EN: Tensor | None = None) -> Tensor:
    """`( sum_env |g_env| )^2` of every edit, `(E,)` (arXiv 2601.19700, eq. 9-11).

    The absolute value is taken per environment: gradients of opposite sign must not cancel, or two environments
    that pull apart would look invariant.

    Args:
        scale_gradients: One `(E,)` tensor per environment, or all of them as `(E, N)`.
        present_EN: False where an edit lacks an environment; all present by default.

    >>> tv_penalty([torch.tensor([1.0]), torch.tensor([-2.0])])
    tensor([9.])
    """
    stacked = scale_gradients if isinstance(scale_gradients, Tensor) else torch.stack(tuple(scale_gradients), dim=-1)
    gradients_EN = upcast(stacked)
    if present_EN is not None:
        gradients_EN = gradients_EN.masked_fill(~present_EN, 0.0)
    return gradients_EN.abs().sum(-1).square()


def penalty_schedule(step: int, max_steps: int, warmup: float = 0.25, ramp: float = 0.10) -> float:
    """The factor of the penalty at a step (0-based): 0 for the first `warmup` of the steps, 1 after `ramp` more.

    While the target's NLL exceeds the entropy, a smaller `|NLL - H|` also means a higher entropy: switched on at
    the start, the penalty would work against the edit. The code of the IRM-TV papers anneals as well.

    Raises:
        ValueError: If `max_steps` is below 1, or `warmup` or `ramp` is negative.

    >>> [penalty_schedule(step, 20) for step in (0, 5, 6, 7, 19)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if max_steps < 1:
        raise ValueError(f"max_steps: got {max_steps}, expected at least 1.")
    if not (warmup >= 0.0 and ramp >= 0.0):
        raise ValueError(f"warmup, ramp: got {warmup} and {ramp}, expected fractions of the steps, 0 or more.")
    start, length = warmup * max_steps, ramp * max_steps
    if step < start:
        return 0.0
    # Rounded because 0.1 * 20 and the like are a last bit off.
    return 1.0 if step >= start + length else round((step - start) / length, 12)


class CountSketch:
    """A fixed random linear map of `phi_e - phi_0` to a few hundred numbers, and the tensors' log-norms.

    Every weight is added, with a random sign, to one bucket: inner products, and with them distances, are preserved on
    average, with variance of order 1/dim. Linear, so that lambda stays a differentiable function of phi_e, which is all
    that the convergence result (Prop. 4.2) asks.

    Differs from the published sketch: buckets are not drawn weight by weight. Each block of dim consecutive weights is
    spread over the dim buckets by a random permutation of its own. Two weights of one block never meet, two of
    different blocks do with probability 1/dim; signs are independent, hence the same mean, and a variance of the same
    order. But every bucket then has a fixed number of weights, read from where they are: no atomic additions, and the
    same sums in the same order each time.

    The hash costs 4 bytes per weight and is shared by all edits; apart from gradients, neither pass creates a tensor of
    the size of all edits' weights. It is drawn on the CPU from the seed and the tensor's name: the same on every
    device, and for every order of the tensors.

    Args:
        sizes: Name to number of weights *of one edit*.
        dim: Number of buckets.
        seed: Fixes the map. Keep it over the steps of an edit, or lambda's input jumps.

    Raises:
        ValueError: For an empty `sizes`, a size below 1, or a `dim` that int16 cannot index.

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

    @property
    def out_dim(self) -> int:
        """Width of the output: buckets, then one log-norm per tensor."""
        return self.dim + len(self.sizes)

    def __call__(self, delta: EditParams) -> Tensor:
        """`(E, dim + number of tensors)`: the sketch, then `log |delta_name|` by sorted name.

        The log-norm is `log(1e-12 + |delta|^2) / 2`: finite, with gradient 0, at phi_0, where delta is 0.

        Raises:
            ValueError: If names or sizes differ from those the sketch was made for.
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
            self._hashes[device] = {name: _Hash(*(table.to(device) for table in one)) for name, one in drawn.items()}
        return self._hashes[device]


def flat_input(params: EditParams) -> Tensor:
    """All weights of each edit, tensors in order of their names, `(E, n)`: the paper's input of lambda."""
    return torch.cat([upcast(params[name]).flatten(1) for name in sorted(params)], dim=-1)


def features(phi_EP: Tensor, risks_ER: Tensor, scale_gradients_EN: Tensor) -> Tensor:
    """Input of lambda, `(E, P + R + N)`: phi_e as sketch or flat, the risks, and every `|g_env|`.

    Risks and gradients are detached: they tell lambda how far the edit is, but the penalty must not be lowered by
    moving phi_e towards risks for which lambda is small.
    """
    context = (upcast(risks_ER).detach(), upcast(scale_gradients_EN).detach().abs())
    return torch.cat([phi_EP, *(part.to(phi_EP.dtype) for part in context)], dim=-1)


@dataclass(frozen=True)
class MultiplierConfig:
    """How lambda(delta, phi_e) is computed.

    Attributes:
        input: `sketch` of phi_e - phi_0, or all of phi_e, `flat`. Flat is what the paper builds on, usable up to
            about a million weights: its first layer has n x width weights per edit.
        depth: Linear layers, 3 in the paper (its Fig. 4 compares 1 to 4).
        width: Hidden units. The paper gives none; 64 is our choice.
        sketch_dim: Buckets of the sketch, 256 to 1024 are sensible. Our choice.
        initial: lambda before the first dual step. Our choice; the paper finds a fixed 0.01 too strong.
        cap: lambda never exceeds it. Our choice.
        detach: Leave the term `penalty * d lambda / d phi_e` out of the primal step. The paper keeps it.

    Raises:
        ValueError: For a value that is not allowed.
    """

    input: MultiplierInput = "sketch"
    depth: int = 3
    width: int = 64
    sketch_dim: int = 512
    initial: float = 1e-3
    cap: float = 0.1
    detach: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "input": (self.input in get_args(MultiplierInput), f"one of {', '.join(get_args(MultiplierInput))}"),
            "depth": (self.depth >= 1, "at least 1 layer"),
            "width": (self.width >= 1, "at least 1 unit"),
            "sketch_dim": (1 <= self.sketch_dim <= MAX_SKETCH_DIM, f"1 to {MAX_SKETCH_DIM}"),
            "cap": (0.0 < self.cap < math.inf, "a positive finite number"),
            "initial": (0.0 < self.initial < self.cap, f"0 < initial < cap (cap is {self.cap})"),
        }
        for name, (is_allowed, expected) in allowed.items():
            if not is_allowed:
                raise ValueError(f"multiplier.{name}: got {getattr(self, name)!r}, expected {expected}.")


class MultiplierNetwork:
    """lambda(delta, phi_e) as a batch of independent perceptrons, one per edit; delta is explicit state.

    Hidden layers are Softplus rather than ReLU: the term `penalty * d lambda / d phi_e` enters the primal step, and
    a smooth lambda keeps it continuous as phi_e moves.
    """

    @staticmethod
    def init(
        config: MultiplierConfig,
        in_dim: int,
        num_edits: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> EditParams:
        """delta before the first step: `weight_<i>` `(E, in, out)` and `bias_<i>` `(E, out)`, float32 leaves.

        Every edit starts from the same weights, drawn on the CPU, so that neither its batch mates nor the device
        change its result. The last layer is small and its bias the inverse Softplus of `config.initial`: lambda
        starts there, within a few percent, whatever the features.
        """
        generator = torch.Generator().manual_seed(seed)
        widths = [in_dim, *[config.width] * (config.depth - 1), 1]
        delta: EditParams = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            is_last = layer == config.depth - 1
            scale = (_LAST_LAYER_SCALE if is_last else 1.0) / math.sqrt(fan_in)
            bias = math.log(math.expm1(config.initial)) if is_last else 0.0
            weight = scale * torch.randn(fan_in, fan_out, generator=generator)
            delta[f"weight_{layer}"] = weight.to(device).repeat(num_edits, 1, 1).requires_grad_()
            delta[f"bias_{layer}"] = torch.full((num_edits, fan_out), bias, device=device).requires_grad_()
        return delta

    @staticmethod
    def apply(config: MultiplierConfig, delta: EditParams, features_EI: Tensor) -> Tensor:
        """lambda of every edit, `(E,)`, in [0, cap].

        Features are divided by `sqrt(1 + mean square)`: small changes of phi_e are passed on as they are, large
        inputs cannot drive the network into saturation, and nothing is divided by zero at phi_0.

        At the cap the value is `min(softplus, cap)` while the gradient is that of the Softplus. The gradient of G
        with respect to lambda is the penalty, never negative, so the dual step always pushes lambda up; with the
        zero gradient of a plain minimum nothing would ever bring it below the cap again.
        """
        # Under autocast the products would run in half precision, too coarse for a lambda of 1e-3.
        with torch.autocast(features_EI.device.type, enabled=False):
            x_EI = features_EI.detach() if config.detach else features_EI
            x_EI = x_EI * torch.rsqrt(1.0 + x_EI.square().mean(-1, keepdim=True))
            for layer in range(config.depth):
                x_EI = torch.einsum("ei,eio->eo", x_EI, delta[f"weight_{layer}"]) + delta[f"bias_{layer}"]
                x_EI = functional.softplus(x_EI)
            uncapped_E = x_EI.squeeze(-1)
            return uncapped_E - (uncapped_E - config.cap).clamp_min(0.0).detach()


class _Hash(NamedTuple):
    """Which weight of a block goes to which bucket, from both sides; plus dim where its sign is negative.

    Attributes:
        bucket_BP: Of the weights of every block, `(blocks, dim)` int16.
        weight_BP: Of the buckets, as places in the block.
    """

    bucket_BP: Tensor
    weight_BP: Tensor

    @classmethod
    def draw(cls, size: int, dim: int, seed: int, name: str) -> _Hash:
        # The CPU generator reads 32 bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        # Row by row, so that a longer tensor has the blocks of a shorter one, and more.
        drawn_B2P = torch.rand(-(-size // dim), 2, dim, generator=generator)
        weight_BP = drawn_B2P[:, 0].argsort(dim=-1)
        negative_BP = (drawn_B2P[:, 1] < 0.5).long() * dim
        bucket_BP = torch.empty_like(weight_BP).scatter_(1, weight_BP, torch.arange(dim).expand_as(weight_BP))
        signed_BP = weight_BP + negative_BP.gather(1, weight_BP)
        return cls((bucket_BP + negative_BP).to(torch.int16), signed_BP.to(torch.int16))


class _BucketSum(torch.autograd.Function):
    """`sum of sign[i] x[e, i]` over the weights i of each bucket, `(E, dim)`, and `|x[e]|^2`, `(E,)`; some blocks at a
    time.

    Plain autograd would keep an int64 index, eight bytes per weight, from forward to backward, and go over the weights
    twice as often.
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
    """Some blocks at a time: which weights, and which blocks, these are."""
    num_blocks, dim = hash.weight_BP.shape
    at_once = _SKETCHED_AT_ONCE.get(x_EN.device.type, _SKETCHED_AT_ONCE["cuda"])
    step = max(1, at_once // (dim * len(x_EN)))
    for start in range(0, num_blocks, step):
        yield slice(start * dim, (start + step) * dim), slice(start, start + step)


def _whole_blocks(x_EM: Tensor, dim: int) -> Tensor:
    """`(E, blocks, dim)`, the last one filled up with zeros."""
    missing = -x_EM.shape[1] % dim
    return (functional.pad(x_EM, (0, missing)) if missing else x_EM).unflatten(1, (-1, dim))
