"""Base of editors that fine-tune additions to linear modules by the likelihood alone (FT-L, FT-V, LoRA).

A subclass defines the trained tensors and what they add to a module's output; sites, optimiser, stop rule and hooks
are defined here.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, holding, is_connector
from odedit.editors.base import EditSize, OptimizerSettings, Plain, Trace, fitting_sites
from odedit.editors.common.hooks import Rewrite, rewritten
from odedit.errors import InputError
from odedit.inputs.batch import EditBatch, EditParams
from odedit.settings import Settings

_EVERY_LAYER = "layers.*."
_ABOVE = re.compile(r"layers\.>(\d{1,2}%)\.(.+)")
"""Every layer above the one at a share of the depth."""


@dataclass(frozen=True)
class FineTuningConfig(Settings):
    """Settings of every fine-tuning editor.

    Attributes:
        sites: Trained modules, in any order: `layers.-1.ffn.in` (the last layer), `layers.25%.<part>` (the layer at a
            quarter of the depth), `layers.>25%.<part>` (one part of all layers above it), `layers.*.<part>` (of every
            layer), `connector.<name>`, where `*` matches anything.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay of the trained tensors.
        max_steps: Number of steps, unless `stopping` ends the edit earlier.
        clip_norm: Largest gradient norm of one edit; null: no clipping.
        stop_loss: Objective below which an edit stops; null: none.
    """

    sites: tuple[str, ...]
    learning_rate: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_steps: Annotated[int, Ge(1)] = 15
    clip_norm: Annotated[float, Gt(0)] | None = None
    stop_loss: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", (self.sites,) if isinstance(self.sites, str) else tuple(self.sites))
        super().__post_init__()
        if not self.sites:
            raise ValueError("sites: got none, expected at least one such as layers.-1.ffn.in.")


def resolve(backbone: Backbone, sites: Sequence[str]) -> list[str]:
    """Names of single modules, with patterns expanded.

    Raises:
        InputError: A site is unknown, a module is named twice, or a pattern matches none.
    """
    names: list[str] = []
    for site in sites:
        matches = _matches(backbone, site)
        if not matches:
            known = " and ".join([holding(backbone, "layers.*.ffn.in"), *backbone.connector_sites()[-1:]])
            among = "" if backbone.connector_sites() else "; the model has no site of the connector"
            raise InputError(f"editor.sites: {site!r} fits no site; there are e.g. {known}{among}.")
        names += matches
    if len({backbone.site(name) for name in names}) < len(names):
        raise InputError(f"editor.sites: got {', '.join(sites)}, expected different matrices.")
    return names


def _matches(backbone: Backbone, site: str) -> list[str]:
    if above := _ABOVE.fullmatch(site):
        first = backbone.layer_of(f"layers.{above[1]}.{above[2]}") + 1
        return [f"layers.{layer}.{above[2]}" for layer in range(first, backbone.num_layers)]
    if "%" in site:
        return [f"layers.{backbone.layer_of(site)}.{site.split('.', 2)[2]}"]
    if "*" not in site:
        return [site]
    if is_connector(site):
        return [name for name in backbone.connector_sites() if fnmatchcase(name, site)]
    if site.startswith(_EVERY_LAYER):
        part = site.removeprefix(_EVERY_LAYER)
        return [f"layers.{layer}.{part}" for layer in range(backbone.num_layers)]
    return []


class FineTuning(Plain, ABC):
    """An editor without own terms, projection or routing; see `odedit.editors.base.Editor` for the other methods."""

    Config: ClassVar[type]
    positionwise = True

    def __init__(self, config: Any) -> None:
        self.config = config
        # Where a pattern over layers starts; a connector pattern lies below all layers.
        starts = (site.replace(_EVERY_LAYER, "layers.0.") for site in config.sites)
        self.sites: Sequence[str] = tuple(_ABOVE.sub(r"layers.\1.ffn.out", site) for site in starts)
        self.max_steps: int = config.max_steps
        self._model: EditParams = {}
        self.optimizer = OptimizerSettings("adamw", config.learning_rate, config.weight_decay, config.clip_norm)

    def check(self, backbone: Backbone) -> None:
        resolve(backbone, self.config.sites)

    def fitted(self, backbone: Backbone) -> Mapping[str, Any]:
        sites = fitting_sites(backbone, self.config.sites)
        return {} if sites == self.config.sites else {"sites": sites}

    @abstractmethod
    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams: ...

    @abstractmethod
    def sites_of(self, params: EditParams) -> list[str]:
        """Names of the modules that `params` change."""

    @abstractmethod
    def change(self, params: EditParams, site: str, x_ENI: Tensor) -> Tensor:
        """Addition to a module's output for N rows of its input, `(E, N, out)`."""

    def changed(self, params: EditParams, site: str, x_ENI: Tensor, y_ENO: Tensor) -> Tensor:
        """A module's output with the addition, `(E, N, out)`."""
        return y_ENO + self.change(params, site, x_ENI)

    @abstractmethod
    def pooled(self, params: EditParams) -> EditParams:
        """One set of parameters (axis 0 has length 1) whose addition is the sum of all edits' additions."""

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        def rewrite_at(site: str) -> Rewrite:
            def rewrite(x: Tensor, y: Tensor) -> Tensor:
                x_ENI, y_ENO = (part.reshape(batch.num_edits, -1, part.shape[-1]) for part in (x, y))
                return self.changed(params, site, x_ENI, y_ENO).reshape(y.shape)

            return rewrite

        with rewritten({backbone.site(site): rewrite_at(site) for site in self.sites_of(params)}):
            yield Trace()

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        for_all = {name: value.expand(batch.num_edits, *value.shape[1:]) for name, value in self.pooled(params).items()}
        with self.applied(backbone, for_all, batch) as trace:
            yield trace

    def following(self, model: EditParams) -> FineTuning:
        other = copy.copy(self)
        other._model = dict(model)
        return other

    def start(self, backbone: Backbone) -> EditParams:
        return self._model

    def extended(self, backbone: Backbone, params: EditParams) -> EditParams:
        return params

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        if self.config.stop_loss is None:
            return torch.zeros_like(token_right_E)
        return loss_E < self.config.stop_loss


class WeightDifferences(FineTuning):
    """One dense weight difference per site and edit: `y = x (W + dW_e)^T`. Parameters are named by their site."""

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        return {
            name: torch.zeros(batch.num_edits, *backbone.site(name).weight.shape, device=batch.tokens_EKS.device)
            for name in resolve(backbone, self.config.sites)
        }

    def size(self, backbone: Backbone, positions: int) -> EditSize:
        weights = [backbone.site(name).weight for name in resolve(backbone, self.config.sites)]
        total = sum(weight.numel() for weight in weights)
        return EditSize(total, dense=0 if weights[0].dtype == torch.float32 else total)

    def sites_of(self, params: EditParams) -> list[str]:
        return list(params)

    def change(self, params: EditParams, site: str, x_ENI: Tensor) -> Tensor:
        # With the matrix as first factor, its gradient needs no transposition.
        return torch.bmm(params[site].to(x_ENI.dtype), x_ENI.transpose(1, 2)).transpose(1, 2)

    def pooled(self, params: EditParams) -> EditParams:
        return {name: delta.sum(dim=0, keepdim=True) for name, delta in params.items()}

    def merged(self, params: EditParams) -> dict[str, Tensor]:
        return {name: delta[0] for name, delta in self.pooled(params).items()}
