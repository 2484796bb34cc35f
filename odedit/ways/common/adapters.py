"""Small edits side by side in one model: each sequence uses the edit that the router chooses for it, or none.

The router's state lies below every edited module, so that one forward reads it and applies the chosen edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from odedit.backbones.base import Backbone, Prefix, holding, is_connector
from odedit.editors.base import Plain, Trace
from odedit.editors.common.fine_tuning import FineTuning, FineTuningConfig, resolve
from odedit.editors.common.hooks import Rewrite, rewritten
from odedit.errors import InputError
from odedit.inputs.batch import EditBatch, EditParams
from odedit.runtime.gather import gather_positions
from odedit.ways.common.router import ROUTER, THRESHOLD, THRESHOLDS, WEIGHTS, choose

CHOICE = "edit_R"
"""Name of the choices in a `Trace`: number of the edit of every sequence, or -1."""

_FIRED = "fired_F"
"""Name of the rows in which an edit fires."""

Positions = Callable[[Tensor], Tensor | None]
"""From the input `(R, S, D)` of the router's module: the position to route at, `(R, 1)`, or None: keep the choice."""


def adapters_of(params: EditParams) -> EditParams:
    """The tensors of the edits, without those of the router."""
    return {name: value for name, value in params.items() if not name.startswith(ROUTER)}


def take(params: EditParams, edits: Sequence[int]) -> EditParams:
    """A committed model with only the edits of these numbers, in this order; its router does not change."""
    shared = (*WEIGHTS, THRESHOLD)
    return {name: value if name in shared else value[list(edits)] for name, value in params.items()}


def without(params: EditParams, index: int) -> EditParams:
    """A committed model without one edit."""
    return take(params, [number for number in range(len(params[THRESHOLDS])) if number != index])


class RoutedEditor(Plain):
    """The editor of a committed model; `together` routes, `applied` gives every edit its own sequences.

    Attributes:
        key: Feed-forward site whose input the router reads; the matrix that holds it reads the same.
    """

    Config: ClassVar[type] = FineTuningConfig

    def __init__(self, editor: FineTuning, key: str) -> None:
        self.config = editor.config
        self.sites: Sequence[str] = (key.replace("ffn.in", "ffn.out"),)  # every model has it, at the same place
        self.optimizer, self.max_steps = editor.optimizer, editor.max_steps
        self.key, self._editor = key, editor

    def check(self, backbone: Backbone) -> None:
        """Raises InputError as the editor's, and for a site below the router's state."""
        self._editor.check(backbone)
        layer, part = backbone.layer_of(holding(backbone, self.key)), self.key.split(".", 2)[2]
        if part != "ffn.in":
            raise InputError(f"commit.key: got {self.key!r}, expected layers.<n>.ffn.in, whose input the router reads.")
        for site in resolve(backbone, self.config.sites):
            above = not is_connector(site) and (backbone.layer_of(site), "ffn" in site) >= (layer, True)
            if not above:
                raise InputError(
                    f"editor.sites: {site!r} lies below commit.key ({self.key!r}, in layer {layer}), where the router "
                    "chooses the edit; choose sites in layers above it or its feed-forward matrices, or a lower "
                    "commit.key."
                )

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        return self._editor.init(backbone, batch, prefix)

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        with self._editor.applied(backbone, adapters_of(params), batch) as trace:
            yield trace

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        last_R1, length = batch.predict_EKT[..., :1].flatten(0, 1), batch.tokens_EKS.shape[2]
        # Shorter inputs are positions after whole sequences, which are routed as their prompts were.
        with self.routed(backbone, params, lambda x_RSD: last_R1 if x_RSD.shape[1] == length else None) as trace:
            yield trace

    @contextmanager
    def routed(self, backbone: Backbone, params: EditParams, positions: Positions) -> Iterator[Trace]:
        """Routes each row of a forward through the model's modules, and applies the chosen edits to it."""
        trace = Trace()
        params = {name: value.to(backbone.device) for name, value in params.items()}
        adapters = adapters_of(params)
        edited: dict[nn.Module, Rewrite] = {
            backbone.site(site): self._rewrite(adapters, site, trace) for site in self._editor.sites_of(adapters)
        }
        # A gate of the key's layer reads the same and runs first, so that an edit of it needs the choice there.
        layer = backbone.layer_of(holding(backbone, self.key))
        gates = [site for site in self._editor.sites_of(adapters) if site.endswith(".ffn.gate")]
        keys = [holding(backbone, self.key), *(site for site in gates if backbone.layer_of(site) == layer)]

        def choosing(module: nn.Module) -> Rewrite:
            def rewrite(x: Tensor, y: Tensor) -> Tensor:
                at_R1 = positions(x)
                if at_R1 is not None:
                    trace.values[CHOICE] = choose(params, gather_positions(x, at_R1).squeeze(1))
                    trace.values[_FIRED] = (trace.values[CHOICE] >= 0).nonzero().squeeze(1)
                return edited[module](x, y) if module in edited else y

            return rewrite

        choices: dict[nn.Module, Rewrite] = {module: choosing(module) for module in map(backbone.site, keys)}
        with torch.no_grad(), _by_row(backbone, self.key, {**edited, **choices}):
            yield trace

    def _rewrite(self, adapters: EditParams, site: str, trace: Trace) -> Rewrite:
        own = {name: value for name, value in adapters.items() if name == site or name.startswith(f"{site}.")}

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            rows_F = trace.values[_FIRED]
            if not len(rows_F):
                return y
            edit_F = trace.values[CHOICE][rows_F]
            chosen = {name: value[edit_F] for name, value in own.items()}
            return y.index_add(0, rows_F, self._editor.change(chosen, site, x[rows_F]))

        return rewrite


@contextmanager
def _by_row(backbone: Backbone, key: str, rewrites: Mapping[nn.Module, Rewrite]) -> Iterator[None]:
    """`rewritten`, for modules whose input is `(R, S, D)` or flat, as in OPT's own forward, `(R S, D)`."""
    rows: list[int] = [0]

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows[0] = len(args[0])

    def by_row(rewrite: Rewrite) -> Rewrite:
        def flat(x: Tensor, y: Tensor) -> Tensor:
            if x.dim() == 3:
                return rewrite(x, y)
            return rewrite(x.unflatten(0, (rows[0], -1)), y.unflatten(0, (rows[0], -1))).flatten(0, 1)

        return flat

    attention = backbone.site(holding(backbone, key.replace("ffn.in", "attention.q")))
    handle = attention.register_forward_pre_hook(count)
    try:
        with rewritten({module: by_row(rewrite) for module, rewrite in rewrites.items()}):
            yield
    finally:
        handle.remove()
