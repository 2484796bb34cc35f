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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from odedit.edits import EditParams
from odedit.risks import upcast

MAX_SKETCH_DIM = 2**14
"""A bucket and a sign are stored as one int16."""

DUAL_DECAY = 1.0001
"""The power of `k + 1` by which the rate of dual step k is divided, as in the IRM-TV code."""

_SKETCH_CHUNK = 2**20
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

    Every weight is added, with a random sign, to one random bucket: inner products, and with them distances, are
    preserved on average, with variance of order 1/dim. Linear, so that lambda stays a differentiable function of
    phi_e, which is all that the convergence result (Prop. 4.2) asks. The hash costs 2 bytes per weight and is
    shared by all edits; apart from gradients, neither pass creates a tensor of the size of the weights.

    A weight's *cell* is its bucket, plus dim if its sign is negative: the sketch is the sum of the first dim cells
    minus the sum of the others, which needs no product with the signs. Cells are drawn on the CPU from the seed and the
    tensor's name: the same on every device, and for every order of the tensors.
    (On CUDA the sums are accumulated in no fixed order: repeats agree up to rounding.)

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
        drawn = {name: _draw_cells(size, dim, seed, name) for name, size in self.sizes.items()}
        self._cells = {torch.device("cpu"): drawn}

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
            sums.append(_CellSum.apply(delta_EN, self._cells_on(delta_EN.device)[name], 2 * self.dim))
            # The derivative of vector_norm at 0 is defined as 0.
            squared_norm_E = torch.linalg.vector_norm(delta_EN, dim=-1).square()
            log_norms.append(0.5 * torch.log(_NORM_FLOOR + squared_norm_E))
        positive_EP, negative_EP = torch.stack(sums).sum(0).chunk(2, dim=-1)
        return torch.cat([positive_EP - negative_EP, torch.stack(log_norms, dim=-1)], dim=-1)

    def _cells_on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._cells:
            drawn = self._cells[torch.device("cpu")]
            self._cells[device] = {name: cells_N.to(device) for name, cells_N in drawn.items()}
        return self._cells[device]


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


class _CellSum(torch.autograd.Function):
    """`out[e, c] = sum of x[e, i] over the weights i of cell c`, chunk by chunk.

    Plain autograd would keep an int64 index, eight bytes per weight, from forward to backward.
    """

    @staticmethod
    def forward(ctx: Any, x_EN: Tensor, cells_N: Tensor, num_cells: int) -> Tensor:
        ctx.save_for_backward(cells_N)
        num_edits, size = x_EN.shape
        out_EC = x_EN.new_zeros(num_edits, num_cells)
        for start in range(0, size, _SKETCH_CHUNK):
            part = slice(start, start + _SKETCH_CHUNK)
            out_EC.scatter_add_(1, cells_N[part].long().expand(num_edits, -1), x_EN[:, part])
        return out_EC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (cells_N,) = ctx.saved_tensors
        (grad_EC,) = grads
        num_edits, size = grad_EC.shape[0], cells_N.shape[0]
        grad_EN = grad_EC.new_empty(num_edits, size)
        for start in range(0, size, _SKETCH_CHUNK):
            part = slice(start, start + _SKETCH_CHUNK)
            grad_EN[:, part] = grad_EC.gather(1, cells_N[part].long().expand(num_edits, -1))
        return grad_EN, None, None


def _draw_cells(size: int, dim: int, seed: int, name: str) -> Tensor:
    # The CPU generator reads 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randint(2 * dim, (size,), generator=generator, dtype=torch.int16)
