"""FT-V: fine-tunes the connector between image tower and text model, per edit.

References:
    The fine-tuning baseline of the MMEdit benchmark (arXiv 2310.08475): Q-Former and projection in BLIP-2 and
    MiniGPT-4, the multimodal projector in LLaVA; AdamW.

Differs from the paper: only the matrices of the connector's linear modules train. Its biases, norms and query tokens,
less than one percent of its parameters, do not, so that an edit is a set of weight differences, which can be merged.

A prompt without picture does not use the connector: its answers cannot change. One edit of BLIP-2's Q-Former has 107
million weights: 0.4 GB, and three times that with the optimiser's moments. Choose the batch size accordingly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from odedit.backbones.base import is_connector
from odedit.editors.common.fine_tuning import FineTuningConfig, WeightDifferences


@dataclass(frozen=True)
class FTVConfig(FineTuningConfig):
    """Settings of FT-V; the defaults are those published for BLIP2-OPT.

    Weight decay, gradient clipping and the stop by loss are off, as published.

    Attributes:
        sites: Trained matrices of the connector, where `*` matches anything; all as published.
        learning_rate: Step size of AdamW: 2e-4 for BLIP2-OPT, 1e-4 for MiniGPT-4 and LLaVA.
        max_steps: Number of steps: 15 for BLIP2-OPT and MiniGPT-4, 10 for LLaVA.
    """

    sites: tuple[str, ...] = ("connector.*",)
    learning_rate: Annotated[float, Gt(0)] = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        outside = [site for site in self.sites if not is_connector(site)]
        if outside:
            raise ValueError(
                f"sites: got {outside[0]!r}, expected sites of the connector such as connector.*; "
                "the editor ftl fine-tunes the text model."
            )


class FTV(WeightDifferences):
    """One weight difference per matrix of the connector and edit."""

    Config: ClassVar[type] = FTVConfig


EDITOR = FTV
