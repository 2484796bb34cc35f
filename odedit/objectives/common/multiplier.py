"""The adaptive multiplier lambda(delta, phi_e) of the invariance penalty: its input, network, and settings.

The primal variable phi_e descends on G = risks + lambda * penalty, the dual variable delta ascends. All functions here
are pure. Axis 0 of every tensor is the edit: each edit has its own network, so its result does not depend on the other
edits of the batch.

References:
    arXiv 2601.19700, eq. 11-13; "Invariant Risk Minimization Is A Total Variation Model" (Lai and Wang, ICML 2024) and
    its out-of-distribution extension (Wang, Lai and Zhong, ICLR 2025) for the primal-dual multiplier.
Differs from the paper:
    The paper's multiplier reads every trainable weight (`input="flat"`). The default is a count-sketch of the weights'
    change: a dense first layer on 26 million weights takes gigabytes per edit.
Differs from the public code of the IRM-TV papers (github.com/laizhr/OOD-TV-IRM):
    The code has no bound on lambda, multiplies it by a constant (200 unless the user gives another), starts the last
    layer unscaled with bias 0, and takes the dual gradient at the phi_e before the primal step, each tensor's divided
    by its own norm and by a power of the number of all steps. `MultiplierConfig.preset("published_code")` does the
    same. Not followed: the code's dual gradients are summed over the steps, its hidden layers are ReLU, and its network
    reads weights without further context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional

from odedit.inputs.batch import EditParams
from odedit.objectives.common.sketch import MAX_SKETCH_DIM
from odedit.risks.risks import upcast
from odedit.settings import Settings

DUAL_DECAY = 1.0001
"""Exponent of `k + 1`, by which the rate of a dual step is divided, as in the IRM-TV code; k is
`MultiplierConfig.counted`.
"""

MultiplierInput = Literal["sketch", "flat"]


def flat_input(params: EditParams) -> Tensor:
    """All weights of each edit, `(E, n)`, tensors ordered by name: the paper's input of lambda."""
    return torch.cat([upcast(params[name]).flatten(1) for name in sorted(params)], dim=-1)


def features(phi_EP: Tensor, risks_ER: Tensor, scale_gradients_EN: Tensor) -> Tensor:
    """Input of lambda, `(E, P + R + N)`: phi_e as sketch or flat, the risks, and `|g_env|` of every environment.

    Risks and gradients are detached, so that phi_e cannot lower the penalty by moving to risks where lambda is small.
    """
    context = (upcast(risks_ER).detach(), upcast(scale_gradients_EN).detach().abs())
    return torch.cat([phi_EP, *(part.to(phi_EP.dtype) for part in context)], dim=-1)


@dataclass(frozen=True)
class MultiplierConfig(Settings):
    """Settings of lambda(delta, phi_e).

    Attributes:
        input: `sketch` of phi_e - phi_0, or `flat`: all of phi_e, as in the paper. `flat` is usable up to about a
            million weights: the first layer has n x width weights per edit.
        depth: Number of linear layers; 3 in the paper, whose Fig. 4 compares 1 to 4.
        width: Number of hidden units. The paper gives no number; 64 is ours.
        sketch_dim: Number of buckets of the sketch; 256 to 1024 are sensible. The default is ours.
        initial: lambda before the first dual step, apart from the draw of the last layer (see `output_scale`). The
            default is ours; the paper finds a fixed 0.01 too strong.
        output_scale: Factor of the last layer's initial weights. Their draw multiplies the first lambda: at 1 by a
            factor of 2 to 3, up or down, that depends on the seed and on `depth`; at 0.01 by a percent. A small factor
            also keeps the layers below it from moving lambda. The default is ours; the public code has 1.
        cap: Upper bound of lambda; null: not bounded. The default is ours.
        weight: Constant factor of lambda in the objective, beyond `cap`.
        normalisation: Divisor of the dual gradient under `dual_schedule: adaptive`: its norm over the whole `network`,
            the norm of each weight matrix and bias (`per_tensor`), or `none`.
        counted: Number k in the adaptive rate: `dual` steps, or `all` steps of the edit with those of the warm-up.
        gradient_at: phi_e of the dual step: `new`, after the primal step, as in eq. 12; or `old`, before it.
        detach: Whether to leave the term `penalty * d lambda / d phi_e` out of the primal step. The paper keeps it.

    Raises:
        ValueError: Value that is not allowed.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ours": {
            "initial": 1e-3, "output_scale": 0.01, "cap": 0.1, "weight": 1.0,
            "normalisation": "network", "counted": "dual", "gradient_at": "new",
        },
        "published_code": {
            "initial": math.log(2), "output_scale": 1.0, "cap": None, "weight": 200.0,
            "normalisation": "per_tensor", "counted": "all", "gradient_at": "old",
        },
    }  # fmt: skip

    input: MultiplierInput = "sketch"
    depth: Annotated[int, Ge(1)] = 3
    width: Annotated[int, Ge(1)] = 64
    sketch_dim: Annotated[int, Ge(1), Le(MAX_SKETCH_DIM)] = 512
    initial: Annotated[float, Gt(0)] = 1e-3
    output_scale: Annotated[float, Gt(0)] = 0.01
    cap: Annotated[float, Gt(0)] | None = 0.1
    weight: Annotated[float, Gt(0)] = 1.0
    normalisation: Literal["network", "per_tensor", "none"] = "network"
    counted: Literal["dual", "all"] = "dual"
    gradient_at: Literal["new", "old"] = "new"
    detach: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap is not None and self.initial >= self.cap:
            raise ValueError(
                f"initial: got {self.initial}, expected less than cap, which is {self.cap}; raise cap, or set it to "
                "null for no bound."
            )


class MultiplierNetwork:
    """lambda(delta, phi_e) as a batch of independent perceptrons, one per edit; their weights delta are an argument.

    The activation is Softplus, not ReLU: the primal step contains `penalty * d lambda / d phi_e`, which is continuous
    if lambda is smooth.
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

        Every edit starts from the same weights, drawn on the CPU, so that its result depends neither on the other edits
        of the batch nor on the device. The last layer's bias is the inverse Softplus of `config.initial`; with the
        default `output_scale` lambda starts within a few percent of `initial` for any features.
        """
        generator = torch.Generator().manual_seed(seed)
        widths = [in_dim, *[config.width] * (config.depth - 1), 1]
        delta: EditParams = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            is_last = layer == config.depth - 1
            scale = (config.output_scale if is_last else 1.0) / math.sqrt(fan_in)
            bias = math.log(math.expm1(config.initial)) if is_last else 0.0
            weight = scale * torch.randn(fan_in, fan_out, generator=generator)
            delta[f"weight_{layer}"] = weight.to(device).repeat(num_edits, 1, 1).requires_grad_()
            delta[f"bias_{layer}"] = torch.full((num_edits, fan_out), bias, device=device).requires_grad_()
        return delta

    @staticmethod
    def apply(config: MultiplierConfig, delta: EditParams, features_EI: Tensor) -> Tensor:
        """lambda of every edit, `(E,)`, in `[0, weight * cap]`.

        Features are divided by `sqrt(1 + mean square)`: small features pass almost unchanged, large ones cannot
        saturate the network, and the divisor is never 0.

        The value is `min(softplus, cap)`, but at the cap the gradient is that of the Softplus. The dual step only
        raises lambda; with the zero gradient of a plain minimum, the primal step could not lower it again.
        """
        # Without autocast, whose half precision is too coarse for a lambda of 1e-3.
        with torch.autocast(features_EI.device.type, enabled=False):
            x_EI = features_EI.detach() if config.detach else features_EI
            x_EI = x_EI * torch.rsqrt(1.0 + x_EI.square().mean(-1, keepdim=True))
            for layer in range(config.depth):
                x_EI = torch.einsum("ei,eio->eo", x_EI, delta[f"weight_{layer}"]) + delta[f"bias_{layer}"]
                x_EI = functional.softplus(x_EI)
            lambda_E = x_EI.squeeze(-1)
            if config.cap is not None:
                lambda_E = lambda_E - (lambda_E - config.cap).clamp_min(0.0).detach()
            return config.weight * lambda_E
