"""FT-L: fine-tunes the two feed-forward matrices of one layer, per edit.

References:
    The fine-tuning baseline of the MMEdit benchmark (arXiv 2310.08475): last layer of the language model, AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import OptimizerSettings, Trace, check_range
from odedit.edits import EditBatch, EditParams
from odedit.errors import InputError
from odedit.hooks import Rewrite, rewritten


@dataclass(frozen=True)
class FTLConfig:
    """Settings of FT-L; the defaults are those published for BLIP2-OPT.

    Attributes:
        sites: Matrices that train, in any order; `layers.-1` is the last layer.
        learning_rate: AdamW step size (2e-4 for BLIP2-OPT, 1e-4 for MiniGPT-4 and LLaVA).
        weight_decay: Decoupled, on the difference to the model's weights.
        max_steps: 15 for BLIP2-OPT, 10 for LLaVA.
        clip_norm: None: no clipping, as published.
        stop_loss: Stops an edit whose objective has come below; None: all steps, as published.
    """

    sites: tuple[str, ...] = ("layers.-1.ffn.in", "layers.-1.ffn.out")
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    max_steps: int = 15
    clip_norm: float | None = None
    stop_loss: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        check_range("learning_rate", self.learning_rate, "> 0", lambda v: v > 0)
        check_range("weight_decay", self.weight_decay, ">= 0", lambda v: v >= 0)
        check_range("max_steps", self.max_steps, ">= 1", lambda v: v >= 1)
        for name in ("clip_norm", "stop_loss"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), "> 0, or null", lambda v: v > 0)
        if not self.sites:
            raise ValueError("sites: got none, expected at least one such as layers.-1.ffn.in.")


class FTL:
    """One weight difference per site and edit: `y = x (W + dW_e)^T`."""

    Config: ClassVar[type] = FTLConfig
    frozen: frozenset[str] = frozenset()
    label_smoothing = 0.0
    starts_neutral = True

    def __init__(self, config: FTLConfig) -> None:
        self.config = config
        self.sites = config.sites
        self.own_slots: tuple[str, ...] = ()
        self.max_steps = config.max_steps
        self.optimizer = OptimizerSettings("adamw", config.learning_rate, config.weight_decay, config.clip_norm)

    def check(self, backbone: Backbone) -> None:
        modules = {backbone.site(name) for name in self.sites}
        if len(modules) < len(self.sites):
            raise InputError(f"editor.sites: got {', '.join(self.sites)}, expected different matrices.")

    def init(self, backbone: Backbone, batch: EditBatch) -> EditParams:
        return {
            name: torch.zeros(batch.num_edits, *backbone.site(name).weight.shape, device=batch.tokens_EKS.device)
            for name in self.sites
        }

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        def rewrite_with(delta_EOI: Tensor) -> Rewrite:
            def rewrite(x: Tensor, y: Tensor) -> Tensor:
                x_ENI = x.reshape(delta_EOI.shape[0], -1, x.shape[-1])
                change = torch.bmm(x_ENI, delta_EOI.to(x.dtype).transpose(1, 2))
                return y + change.reshape(y.shape)

            return rewrite

        with rewritten({backbone.site(name): rewrite_with(delta) for name, delta in params.items()}):
            yield Trace()

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        summed = {
            name: delta.sum(dim=0, keepdim=True).expand(batch.num_edits, -1, -1) for name, delta in params.items()
        }
        with self.applied(backbone, summed, batch) as trace:
            yield trace

    def own_risk(self, params: EditParams, trace: Trace, batch: EditBatch) -> Tensor:
        return torch.zeros(batch.num_edits, device=batch.tokens_EKS.device)

    def constrain(self, params: EditParams) -> EditParams:
        return params

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        if self.config.stop_loss is None:
            return torch.zeros_like(token_right_E)
        return loss_E < self.config.stop_loss

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        return params

    def merged(self, params: EditParams) -> dict[str, Tensor]:
        return {name: delta.sum(dim=0) for name, delta in params.items()}


EDITOR = FTL
