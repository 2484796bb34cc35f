"""Forward state below an edited site, which an optimisation step starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odedit.backbones.common.layer_inputs import LayerInputs
from odedit.runtime.brief import brief

CONNECTOR = "connector."
"""Beginning of the names of sites between image tower and text model."""


def is_connector(site: str) -> bool:
    """Whether a site lies between the image tower and the text model."""
    return site.startswith(CONNECTOR)


@dataclass(frozen=True)
class BeforeConnector:
    """Input of the connector, one row per sequence, so that an edit of the connector changes its own sequences only.

    Attributes:
        vision_RPW: Image tower's output for each sequence's picture, `(R, patches, width)`; zeros without a picture.
        image_RS: True at positions that take image features.
    """

    vision_RPW: Tensor
    image_RS: Tensor

    __repr__ = brief

    def take(self, rows: Tensor) -> BeforeConnector:
        """The sequences with these row numbers."""
        return BeforeConnector(self.vision_RPW[rows], self.image_RS[rows])


@dataclass(frozen=True)
class Prefix:
    """Everything below an edited site, computed once.

    Attributes:
        layer: Decoder layer that the suffix starts in.
        at_ffn: Whether the suffix starts at that layer's feed-forward half, after attention.
        hidden_RSD: Residual stream there, of R = E x K sequences; embedded tokens if `connector` is set.
        shape: (E, K).
        whole_layer: Highest layer in which an edit reads whole sequences; -1 if there is none.
        inputs: What the layers read besides, for text models with rotary embeddings.
        connector: Input of the connector, if the suffix starts there.
        is_read: Whether `hidden_RSD` holds only the positions that are read, `(R, T, D)`.
    """

    layer: int
    at_ffn: bool
    hidden_RSD: Tensor
    shape: tuple[int, int]
    whole_layer: int
    inputs: LayerInputs | None = None
    connector: BeforeConnector | None = None
    is_read: bool = False

    __repr__ = brief

    def take(self, edits: Tensor) -> Prefix:
        """The edits with these row numbers, with all their sequences."""
        num_slots = self.shape[1]
        rows = edits.unsqueeze(1) * num_slots + torch.arange(num_slots, device=edits.device)
        return self._rows(rows)

    def pick(self, columns_EK: Tensor) -> Prefix:
        """All edits, each with its own choice of sequences, by slot number."""
        first_E1 = torch.arange(len(columns_EK), device=columns_EK.device).unsqueeze(1) * self.shape[1]
        return self._rows(first_E1 + columns_EK)

    def column(self, number: int) -> Prefix:
        """All edits with the sequence of one slot number."""
        return self.pick(torch.full((self.shape[0], 1), number, device=self.hidden_RSD.device))

    def _rows(self, rows_EK: Tensor) -> Prefix:
        rows = rows_EK.flatten()
        return replace(
            self,
            hidden_RSD=self.hidden_RSD[rows],
            shape=(rows_EK.shape[0], rows_EK.shape[1]),
            inputs=None if self.inputs is None else self.inputs.rows(rows),
            connector=None if self.connector is None else self.connector.take(rows),
        )
