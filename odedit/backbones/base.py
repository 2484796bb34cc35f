"""What odedit needs of a multimodal model: encode once, run the frozen part once, run the rest often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from odedit.edits import EditBatch, Picture, Probe
from odedit.prompts import Template


@dataclass(frozen=True)
class Prefix:
    """Everything below an edited site, computed once.

    Attributes:
        layer: Decoder layer that the suffix starts in.
        at_ffn: Whether it starts at that layer's feed-forward half, after attention.
        hidden_RSD: The residual stream there, R = E x K sequences.
        shape: (E, K).
    """

    layer: int
    at_ffn: bool
    hidden_RSD: Tensor
    shape: tuple[int, int]


class Processor(Protocol):
    """The part of a backbone that needs no weights: pictures and text to arrays. Used on CPU workers."""

    tokenizer: Any

    def process(self, picture: Picture) -> Picture:
        """The picture as the image tower takes it, `float32 (3, height, width)`; a processed one as it is."""
        ...


class Backbone(Protocol):
    """A frozen multimodal model that edits can be applied to.

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

    def image_features(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]:
        """Features `(query tokens, hidden)` of each distinct picture, by its key."""
        ...

    def encode(
        self,
        edit_ids: Sequence[str],
        slots: Sequence[str],
        grid: Sequence[Sequence[Probe | None]],
        features: Mapping[str, Tensor],
        template: Template,
    ) -> EditBatch:
        """Tokens, masks and features of an E x K grid of probes (None: absent)."""
        ...

    def site(self, name: str) -> nn.Linear:
        """The linear module of a site such as `layers.23.ffn.in`; InputError names the sites there are."""
        ...

    def activation(self, site: str) -> Callable[[Tensor], Tensor]:
        """The model's own nonlinearity behind a feed-forward site."""
        ...

    def prefix(self, batch: EditBatch, *sites: str) -> Prefix:
        """Runs everything below the lowest of the sites, which may come in any order."""
        ...

    def suffix(self, prefix: Prefix) -> Tensor:
        """From the prefix to the hidden states after the final norm, `(E, K, S, D)`."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits `(..., V)` of final hidden states `(..., D)`. The head has no bias."""
        ...
