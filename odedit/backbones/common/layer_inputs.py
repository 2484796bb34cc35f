"""What layers of a text model read besides the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from odedit.runtime.brief import brief
from odedit.runtime.gather import gather_positions

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines `(1 or R, S, head width)`."""


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of the layers, one row per sequence, or one row for all where they are equal.

    Attributes:
        rotary: Rotary embeddings of the positions, one for each kind of layer.
        mask_RSS: True where a position attends to another; None: to itself and all before it.
        added: What is added to the residual stream after a layer, `(R, S, D)`, by layer.
    """

    rotary: tuple[Rotary, ...]
    mask_RSS: Tensor | None = None
    added: Mapping[int, Tensor] = field(default_factory=dict)

    __repr__ = brief

    def rows(self, rows: slice | Tensor) -> LayerInputs:
        """The sequences with these row numbers."""
        return LayerInputs(
            tuple((_rows(cos, rows), _rows(sin, rows)) for cos, sin in self.rotary),
            None if self.mask_RSS is None else _rows(self.mask_RSS, rows),
            {layer: part[rows] for layer, part in self.added.items()},
        )

    def to(self, device: torch.device) -> LayerInputs:
        """The same on a device."""
        return LayerInputs(
            tuple((cos.to(device), sin.to(device)) for cos, sin in self.rotary),
            None if self.mask_RSS is None else self.mask_RSS.to(device),
            {layer: part.to(device) for layer, part in self.added.items()},
        )

    def at(self, positions_RT: Tensor) -> LayerInputs:
        """Rotary embeddings of these positions alone."""
        count = len(positions_RT)
        read = [
            tuple(gather_positions(part.expand(count, -1, -1), positions_RT) for part in pair) for pair in self.rotary
        ]
        return LayerInputs(tuple((cos, sin) for cos, sin in read))

    def mask_at(self, positions_RT: Tensor) -> Tensor:
        """Rows of the mask at these positions, `(R, T, S)`."""
        assert self.mask_RSS is not None
        return gather_positions(self.mask_RSS.expand(len(positions_RT), -1, -1), positions_RT)

    def after(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        """The residual stream that the next layer reads."""
        added_RSD = self.added.get(layer)
        return hidden_RSD if added_RSD is None else hidden_RSD + added_RSD

    def with_added(self, added: Mapping[int, Tensor]) -> LayerInputs:
        """The same with other additions."""
        return replace(self, added=added)


def _rows(part: Tensor, rows: slice | Tensor) -> Tensor:
    return part if len(part) == 1 else part[rows]
