"""FT-L: fine-tunes the two feed-forward matrices of one layer, per edit.

References:
    The fine-tuning baseline of the MMEdit benchmark (arXiv 2310.08475): last layer of the language model, AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from odedit.editors.common.fine_tuning import FineTuningConfig, WeightDifferences


@dataclass(frozen=True)
class FTLConfig(FineTuningConfig):
    """Settings of FT-L; the defaults are those published for BLIP2-OPT.

    Weight decay, gradient clipping and the stop by loss are off, as published.

    Attributes:
        sites: Trained matrices: both feed-forward matrices of the last layer. In a gated layer (LLaMA) `ffn.in` is the
            up and `ffn.out` the down projection.
        learning_rate: Step size of AdamW: 2e-4 for BLIP2-OPT, 1e-4 for MiniGPT-4 and LLaVA.
        max_steps: Number of steps: 15 for BLIP2-OPT and MiniGPT-4, 10 for LLaVA.
    """

    sites: tuple[str, ...] = ("layers.-1.ffn.in", "layers.-1.ffn.out")
    learning_rate: Annotated[float, Gt(0)] = 2e-4


class FTL(WeightDifferences):
    """One weight difference per site and edit."""

    Config: ClassVar[type] = FTLConfig


EDITOR = FTL
