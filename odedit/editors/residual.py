"""Residual: one vector per edit, added to the output of one module wherever the answer is predicted.

The vector acts on every prompt alike, so a single edit is reliable and general but not local. `commit.way: bulk` writes
the vectors of many records into the weights, each for the prompts of its record.

References:
    Mass-Editing Memory in a Transformer (MEMIT, arXiv 2210.07229), section 4.3: the vector that is optimised per fact.

Differs from MEMIT: the vector acts where the answer is predicted, from the last position of the prompt on, and not at
the last token of a subject, which a question about a picture does not name; and the loss is the run's objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, holding, is_connector
from odedit.editors.base import EditSize, OptimizerSettings, Plain, Trace, fitting_sites
from odedit.editors.common.hooks import rewritten
from odedit.editors.common.vectors import VECTOR
from odedit.errors import InputError
from odedit.inputs.batch import EditBatch, EditParams
from odedit.settings import Settings


@dataclass(frozen=True)
class ResidualConfig(Settings):
    """Settings of residuals; chosen on the validation split of the embedded world, BLIP-2 and LLaVA.

    Attributes:
        site: Module to whose output the vector is added: `layers.<n>.<part>`, or `layers.75%.<part>` at three quarters
            of the depth.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of the vector.
        max_steps: Number of steps, unless `stopping` ends the edit earlier.
    """

    site: str = "layers.75%.ffn.out"
    learning_rate: Annotated[float, Gt(0)] = 0.1
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_steps: Annotated[int, Ge(1)] = 200


class Residual(Plain):
    """phi_e: `residual` `(E, D)`, D the width of the site's output."""

    Config: ClassVar[type] = ResidualConfig

    def __init__(self, config: ResidualConfig) -> None:
        self.config = config
        self.sites, self.vector_site = (config.site,), config.site
        self.max_steps = config.max_steps
        self.optimizer = OptimizerSettings("adamw", config.learning_rate, config.weight_decay)

    def check(self, backbone: Backbone) -> None:
        if is_connector(self.config.site):
            raise InputError(
                f"editor.site: got {self.config.site!r}, but residuals act where the text model predicts an answer; "
                "expected a site of it, such as layers.75%.ffn.out."
            )
        backbone.site(self.config.site)

    def fitted(self, backbone: Backbone) -> Mapping[str, Any]:
        (site,) = fitting_sites(backbone, self.sites)
        return {} if site == self.config.site else {"site": site}

    def size(self, backbone: Backbone, positions: int) -> EditSize:
        return EditSize(len(backbone.site(self.config.site).weight))

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        width = len(backbone.site(holding(backbone, self.config.site)).weight)
        return {VECTOR: torch.zeros(batch.num_edits, width, device=batch.tokens_EKS.device)}

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        length, grid = batch.tokens_EKS.shape[2], batch.present_EK.shape
        index_S = torch.arange(length, device=batch.tokens_EKS.device)
        is_answer_EKS1 = (index_S >= batch.predict_EKT[..., :1]).unsqueeze(-1)

        def add(x: Tensor, y: Tensor) -> Tensor:
            added_E11D = params[VECTOR].to(y.dtype)[:, None, None]
            # Shorter inputs are positions after whole sequences, all of them of the answer.
            added = added_E11D * is_answer_EKS1 if y.shape[1] == length else added_E11D
            return (y.unflatten(0, grid) + added).flatten(0, 1)

        with rewritten({backbone.site(holding(backbone, self.config.site)): add}):
            yield Trace()

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        """The sum of all vectors, on every prompt."""
        for_all = {VECTOR: params[VECTOR].sum(dim=0, keepdim=True).expand(batch.num_edits, -1)}
        with self.applied(backbone, for_all, batch) as trace:
            yield trace


EDITOR = Residual
