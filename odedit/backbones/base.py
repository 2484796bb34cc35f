"""What odedit needs of a multimodal model: encode once, run the frozen part once, run the rest often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from odedit.inputs.batch import EditBatch, Picture, Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.prompts import Template
from odedit.runtime.brief import brief
from odedit.runtime.kv_cache import KeyValues

CONNECTOR = "connector."
"""How the names of sites between image tower and text model begin."""


def is_connector(site: str) -> bool:
    """Whether a site stands between the image tower and the text model."""
    return site.startswith(CONNECTOR)


def ends_of(backbone: Backbone) -> frozenset[int]:
    """The backbone's `ends`; of a family that does not name them, the tokenizer's end of a text."""
    named: frozenset[int] | None = getattr(backbone, "ends", None)
    if named is None:
        end = backbone.processor.tokenizer.eos_token_id
        return frozenset({0 if end is None else end})
    return named


@dataclass(frozen=True)
class BeforeConnector:
    """What enters the connector, one row per sequence: an edit of the connector is seen by its own sequences only.

    Attributes:
        vision_RPW: What the image tower made of each sequence's picture, `(R, patches, width)`; zeros without one.
        image_RS: Positions that take image features.
    """

    vision_RPW: Tensor
    image_RS: Tensor

    __repr__ = brief

    def take(self, rows: Tensor) -> BeforeConnector:
        """These sequences alone."""
        return BeforeConnector(self.vision_RPW[rows], self.image_RS[rows])


@dataclass(frozen=True)
class Prefix:
    """Everything below an edited site, computed once.

    Attributes:
        layer: Decoder layer that the suffix starts in.
        at_ffn: Whether it starts at that layer's feed-forward half, after attention.
        hidden_RSD: The residual stream there, R = E x K sequences; the embedded tokens where `connector` is given.
        shape: (E, K).
        whole_layer: The highest layer in which an edit looks at whole sequences; -1: in none.
        rotary: Cosines and sines of the positions, for text models with rotary embeddings.
        connector: Given where the suffix starts at the connector.
        is_read: Whether it holds the positions that are read alone, `(R, T, D)`.
    """

    layer: int
    at_ffn: bool
    hidden_RSD: Tensor
    shape: tuple[int, int]
    whole_layer: int
    rotary: tuple[Tensor, Tensor] | None = None
    connector: BeforeConnector | None = None
    is_read: bool = False

    __repr__ = brief

    def take(self, edits: Tensor) -> Prefix:
        """The sequences of the edits with these rows, alone."""
        num_slots = self.shape[1]
        rows = edits.unsqueeze(1) * num_slots + torch.arange(num_slots, device=edits.device)
        return self._rows(rows)

    def pick(self, columns_EK: Tensor) -> Prefix:
        """Of every edit the sequences with these numbers, in this order."""
        first_E1 = torch.arange(len(columns_EK), device=columns_EK.device).unsqueeze(1) * self.shape[1]
        return self._rows(first_E1 + columns_EK)

    def column(self, number: int) -> Prefix:
        """Of every edit the sequence with this number."""
        return self.pick(torch.full((self.shape[0], 1), number, device=self.hidden_RSD.device))

    def _rows(self, rows_EK: Tensor) -> Prefix:
        rows = rows_EK.flatten()
        rotary = None
        if self.rotary is not None:
            cos, sin = (part if part.shape[0] == 1 else part[rows] for part in self.rotary)
            rotary = (cos, sin)
        return replace(
            self,
            hidden_RSD=self.hidden_RSD[rows],
            shape=(rows_EK.shape[0], rows_EK.shape[1]),
            rotary=rotary,
            connector=None if self.connector is None else self.connector.take(rows),
        )


class Processor(Protocol):
    """The part of a backbone that needs no weights: pictures and text to arrays. Used on CPU workers."""

    tokenizer: Any

    def process(self, picture: Picture) -> Picture:
        """The picture as the image tower takes it, `float32 (3, height, width)`; a processed one as it is."""
        ...


class Backbone(Protocol):
    """A frozen multimodal model that edits can be applied to.

    `ends` are the tokens that end an answer: those of the checkpoint's generation settings and tokenizer, and where a
    family ends its turns by a text, those that begin it.

    Between `encode` and `suffix` nothing depends on an edit: `encode` runs the image tower once per distinct picture,
    `prefix` the language model below the lowest edited site once per batch, and an optimisation step runs `suffix`
    only.
    """

    family: str
    checkpoint: str
    fingerprint: str
    processor: Processor
    num_layers: int
    hidden_size: int
    max_positions: int
    vocabulary_size: int
    ends: frozenset[int]

    def image_features(self, pictures: Sequence[Picture], before_connector: bool = False) -> Mapping[str, Tensor]:
        """Features `(L, hidden)` of each distinct picture, by its key; `(patches, width)` before the connector."""
        ...

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        """A probe's tokens, and where its picture and its target stand.

        Raises:
            InputError: Its text holds an image marker or a special token of the tokenizer.
            ValueError: The target has no token.
        """
        ...

    def encode(
        self,
        edit_ids: Sequence[str],
        slots: Sequence[str],
        grid: Sequence[Sequence[Probe | None]],
        features: Mapping[str, Tensor],
        template: Template,
        before_connector: bool = False,
    ) -> EditBatch:
        """Tokens, masks and features of an E x K grid of probes (None: absent).

        Args:
            before_connector: How `features` were made by `image_features`.

        Raises:
            InputError: A probe has more tokens than `max_positions`, or an image marker or special token in its text.
            ValueError: A target has no token.
        """
        ...

    def site(self, name: str) -> nn.Linear:
        """The linear module of a site such as `layers.23.ffn.in`; InputError names the sites there are."""
        ...

    def connector_sites(self) -> tuple[str, ...]:
        """`connector.<module>` of every linear module between image tower and text model, in the model's order."""
        ...

    def activation(self, site: str) -> Callable[[Tensor], Tensor]:
        """The model's own nonlinearity behind a feed-forward site; the identity where none follows.

        Raises:
            InputError: A site of attention or connector, whose output enters no feed-forward neurons.
        """
        ...

    def prefix(
        self,
        batch: EditBatch,
        *sites: str,
        positionwise: bool = False,
        memory: KeyValues | None = None,
        read_EKT: Tensor | None = None,
    ) -> Prefix:
        """Runs everything below the lowest of the sites, which may come in any order.

        Args:
            positionwise: Whether what an edit adds at a position depends on the states at this position alone.
            memory: Takes the keys and values, for `behind`.
            read_EKT: The positions that `suffix` will be asked for, if always the same: where no other is needed from
                here on, only these are kept.

        Raises:
            ValueError: A connector site, and a batch whose features have left the connector.
        """
        ...

    def suffix(self, prefix: Prefix, read_EKT: Tensor | None = None, memory: KeyValues | None = None) -> Tensor:
        """From the prefix to the hidden states after the final norm, `(E, K, S, D)`.

        Args:
            read_EKT: The positions that are read; then `(E, K, T, D)`, and the last layer computes no other, unless an
                edit there needs them.
            memory: Takes the keys and values, for `behind`.
        """
        ...

    def with_room(self, prefix: Prefix, batch: EditBatch) -> Prefix:
        """A prefix whose rotary table also covers the positions that `EditBatch.with_room` adds."""
        ...

    def behind(self, prefix: Prefix, batch: EditBatch, tokens_EKT: Tensor, memory: KeyValues, first: int = 0) -> Tensor:
        """Final states at the target's tokens but the last, `(E, K, T - 1, D)`, were `tokens_EKT` the target.

        Only these positions run, after `prefix` and `suffix` have filled `memory`; under an edit inside the same
        `applied` block.

        Args:
            tokens_EKT: Target tokens, at most as many as the batch has.
            first: Runs and returns tokens from this one on; those in front are as in an earlier call.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits `(..., V)` of final hidden states `(..., D)`. The head has no bias."""
        ...
