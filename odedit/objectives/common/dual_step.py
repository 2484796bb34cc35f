"""The dual step: the input of lambda(delta, phi_e), and the ascent of its network.

`odedit.editing.primal_dual` has one network per edit, `odedit.training.multiplier` one for all training records.

References:
    arXiv 2601.19700, eq. 11-13.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from odedit.inputs.batch import EditParams
from odedit.objectives.common.multiplier import MultiplierConfig, features, flat_input
from odedit.objectives.common.penalty import Invariance
from odedit.objectives.common.sketch import CountSketch
from odedit.objectives.common.terms import Terms


def context(
    config: MultiplierConfig, params: EditParams, terms: Terms, seed: int, origin: EditParams | None = None
) -> Tensor:
    """Input of lambda, `(E, I)`: phi_e as sketch or flat, the risks, and |g| of every environment.

    Args:
        params: phi_e of E edits.
        seed: Seed of the sketch; constant over the steps.
        origin: phi_0, subtracted before sketching; None: `params` are already changes of weights.
    """
    if config.input == "flat":
        phi_EP = flat_input(params)
    else:
        change = params if origin is None else {name: value - origin[name] for name, value in params.items()}
        sizes = tuple((name, value[0].numel()) for name, value in sorted(change.items()))
        phi_EP = _sketch(sizes, config.sketch_dim, seed)(change)
    return features(phi_EP, *terms.multiplier_inputs())


def ascended(config: Invariance, delta: EditParams, gain: Tensor, decay_N: Tensor) -> EditParams:
    """`delta + rate * grad_delta gain` of N networks, detached.

    The rate is gamma_2, divided by the norm of the gradient and by `decay_N` under `dual_schedule: adaptive`. The
    public IRM-TV code takes the norm of each tensor, and counts all steps; see `MultiplierConfig.normalisation` and
    `counted`.

    Args:
        delta: Weights of the networks, leaves with axis 0 of length N.
        gain: The penalty's part of G, a scalar.
        decay_N: `(k + 1) ** DUAL_DECAY` for the number k of each network's dual step.
    """
    # A fresh gradient each time; the public IRM-TV code accumulates them over the steps.
    gradients = torch.autograd.grad(gain, list(delta.values()))
    rates_N = _rates(config, gradients, decay_N)
    with torch.no_grad():
        return {
            name: value + rate_N.reshape(-1, *[1] * (value.dim() - 1)) * gradient
            for (name, value), rate_N, gradient in zip(delta.items(), rates_N, gradients, strict=True)
        }


def _rates(config: Invariance, gradients: Sequence[Tensor], decay_N: Tensor) -> list[Tensor]:
    """Step size of each tensor of N networks, `(N,)`; 0 where the norm that divides its gradient is 0."""
    rate_N = torch.full_like(decay_N, config.dual_rate)
    normalisation = config.multiplier.normalisation
    if config.dual_schedule == "constant" or normalisation == "none":
        return [rate_N if config.dual_schedule == "constant" else rate_N / decay_N] * len(gradients)
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients]
    norms = [square.sqrt() for square in (squares if normalisation == "per_tensor" else [torch.stack(squares).sum(0)])]
    rates = [torch.where(norm > 0, rate_N / (norm.clamp_min(1e-30) * decay_N), 0.0) for norm in norms]
    return rates if normalisation == "per_tensor" else rates * len(gradients)


@lru_cache(maxsize=8)
def _sketch(sizes: tuple[tuple[str, int], ...], dim: int, seed: int) -> CountSketch:
    """Cached: drawing the hash of a large matrix takes as long as a step, and it is the same for every batch."""
    return CountSketch(dict(sizes), dim, seed)
