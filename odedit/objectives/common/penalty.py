"""The invariance penalty, its schedule over the steps, and how it enters an objective.

    G(delta, phi_e) = risks(phi_e) + lambda(delta, phi_e) * ( sum over environments |g_env| )^2

References:
    arXiv 2601.19700, eq. 9-13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from odedit.objectives.common.multiplier import MultiplierConfig
from odedit.risks.risks import upcast

FELT = 0.05
"""lambda below which the penalty hardly changes an edit.

Of 48 edits of the embedded BLIP-2, 17 take another number of steps with lambda near 0.06, at most one near 0.001.
"""
_USUAL_STEPS = 20


@dataclass(frozen=True)
class Invariance:
    """Settings of the invariance penalty.

    Attributes:
        fixed: Value of a fixed lambda; 0: no penalty; None: lambda is learned.
        warmup: Share of the steps without penalty.
        ramp: Share of the steps over which the penalty rises to its full weight.
        dual_rate: Learning rate of the multiplier network.
        dual_schedule: `adaptive` divides the rate by (k + 1)^1.0001 and by the gradient's norm, as the IRM-TV code does
            (see `multiplier.normalisation` and `multiplier.counted`); or `constant`.
        multiplier: Settings of the multiplier network.
    """

    fixed: float | None = 0.0
    warmup: float = 0.25
    ramp: float = 0.10
    dual_rate: float = 1e-3
    dual_schedule: Literal["adaptive", "constant"] = "adaptive"
    multiplier: MultiplierConfig = field(default_factory=MultiplierConfig)

    @property
    def reach(self) -> float:
        """Largest lambda that an edit of `_USUAL_STEPS` steps can be expected to reach; infinity if there is no bound.

        The gradient of the network's output with respect to its last layer has a norm of about sqrt(width + 1), and a
        small Softplus output is the exponential of its input, so dual steps of lengths gamma_2 / (k + 1) multiply
        lambda by at most exp(gamma_2 sqrt(width + 1) sum_k 1 / (k + 1)).
        """
        settings = self.multiplier
        if self.fixed is not None:
            return self.fixed
        if self.dual_schedule == "constant" or settings.normalisation == "none":
            return settings.weight * (math.inf if settings.cap is None else settings.cap)
        travel = self.dual_rate * sum(1 / (step + 1) for step in range(_USUAL_STEPS))
        factor = math.exp(min(50.0, travel * math.sqrt(settings.width + 1)))
        first = settings.initial * factor
        return settings.weight * (first if settings.cap is None else min(first, settings.cap))


def tv_penalty(scale_gradients: Sequence[Tensor]) -> Tensor:
    """`( sum_env |g_env| )^2` of every edit, `(E,)` (arXiv 2601.19700, eq. 9-11).

    The absolute value is taken per environment: gradients of opposite sign must not cancel, or two environments that
    pull in opposite directions would look invariant.

    Args:
        scale_gradients: One `(E,)` tensor per environment.

    >>> tv_penalty([torch.tensor([1.0]), torch.tensor([-2.0])])
    tensor([9.])
    """
    return upcast(torch.stack(tuple(scale_gradients), dim=-1)).abs().sum(-1).square()


def penalty_schedule(step: int, max_steps: int, warmup: float = 0.25, ramp: float = 0.10) -> float:
    """Factor of the penalty at a step: 0 during the warm-up, then rising linearly to 1 during the ramp.

    The scale gradient of the NLL is NLL - H. While the answer is unlikely, the penalty falls fastest by a higher
    entropy H, which works against the edit; hence the warm-up. The code of the IRM-TV papers anneals as well.

    Args:
        step: Number of the step, from 0.
        warmup, ramp: Shares of `max_steps`.

    Raises:
        ValueError: `max_steps` below 1, or negative `warmup` or `ramp`.

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
    # Rounded: products such as 0.1 * 20 are off by the last bit.
    return 1.0 if step >= start + length else round((step - start) / length, 12)
