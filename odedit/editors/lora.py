"""LoRA: a low-rank addition to chosen matrices, per edit.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.1: `B` starts at zero, and the
    addition is scaled by alpha / rank. `A` starts as in the authors' code and in `peft`: uniform with Kaiming's bound
    for a = sqrt(5), which is 1 / sqrt(in).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import EditSize
from odedit.editors.common.fine_tuning import FineTuning, FineTuningConfig, resolve
from odedit.inputs.batch import EditBatch, EditParams

_A, _B = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class LoRAConfig(FineTuningConfig):
    """Settings of LoRA.

    Attributes:
        sites: Matrices that get an addition: queries and values of every layer, as in the paper's experiments.
        learning_rate: Step size of AdamW. Our choice: the paper's 2e-4 is for corpora, too small for one record and a
            few dozen steps.
        max_steps: Number of steps. Our choice: the paper trains for epochs.
        rank: Rank of the addition.
        alpha: Numerator of the scale alpha / rank of the addition.
        seed: Seed of `A`, used with the edit's id and the site: `A` is the same in any batch.
        weight_decay: Decoupled weight decay of `A` and `B`.
    """

    sites: tuple[str, ...] = ("layers.*.attention.q", "layers.*.attention.v")
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    max_steps: Annotated[int, Ge(1)] = 50
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    seed: int = 0


class LoRA(FineTuning):
    """Two factors per site and edit: `y = x W^T + alpha / rank (x A_e^T) B_e^T`."""

    Config: ClassVar[type] = LoRAConfig

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        rank, device = self.config.rank, batch.tokens_EKS.device
        params: EditParams = {}
        for name in resolve(backbone, self.config.sites):
            width_out, width_in = backbone.site(name).weight.shape
            drawn = [self._draw(edit_id, name, width_in) for edit_id in batch.edit_ids]
            params[name + _A] = torch.stack(drawn).to(device)
            params[name + _B] = torch.zeros(batch.num_edits, width_out, rank, device=device)
        return params

    def size(self, backbone: Backbone, positions: int) -> EditSize:
        widths = sum(sum(backbone.site(name).weight.shape) for name in resolve(backbone, self.config.sites))
        return EditSize(self.config.rank * widths)

    def _draw(self, edit_id: str, site: str, width_in: int) -> Tensor:
        """`A` of one edit, `(rank, in)`; drawn on the CPU, so that it is the same on every device."""
        digest = hashlib.sha256(f"{self.config.seed}/{edit_id}/{site}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return (2 * torch.rand(self.config.rank, width_in, generator=generator) - 1) / math.sqrt(width_in)

    def sites_of(self, params: EditParams) -> list[str]:
        return [name.removesuffix(_A) for name in params if name.endswith(_A)]

    def change(self, params: EditParams, site: str, x_ENI: Tensor) -> Tensor:
        a_ERI, b_EOR = (params[site + factor].to(x_ENI.dtype) for factor in (_A, _B))
        return self._scaling * torch.bmm(torch.bmm(x_ENI, a_ERI.transpose(1, 2)), b_EOR.transpose(1, 2))

    def changed(self, params: EditParams, site: str, x_ENI: Tensor, y_ENO: Tensor) -> Tensor:
        # One product adds to the output: passes over tensors of its size take as long as products of low rank.
        a_ERI, b_EOR = (params[site + factor].to(x_ENI.dtype) for factor in (_A, _B))
        low_ENR = torch.bmm(x_ENI, a_ERI.transpose(1, 2))
        return torch.baddbmm(y_ENO, low_ENR, b_EOR.transpose(1, 2), alpha=self._scaling)

    def pooled(self, params: EditParams) -> EditParams:
        """The factors side by side: E additions of rank r are one of rank E r."""
        pooled: EditParams = {}
        for site in self.sites_of(params):
            pooled[site + _A] = params[site + _A].flatten(0, 1).unsqueeze(0)
            pooled[site + _B] = params[site + _B].transpose(0, 1).flatten(1).unsqueeze(0)
        return pooled

    def merged(self, params: EditParams) -> dict[str, Tensor]:
        pooled = self.pooled(params)
        return {site: self._scaling * pooled[site + _B][0] @ pooled[site + _A][0] for site in self.sites_of(pooled)}

    @property
    def _scaling(self) -> float:
        return float(self.config.alpha / self.config.rank)


EDITOR = LoRA
