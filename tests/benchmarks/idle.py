"""An editor that edits nothing, to measure the pipeline's own time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import OptimizerSettings, Plain, Trace
from odedit.inputs.batch import EditBatch, EditParams


@dataclass(frozen=True)
class IdleConfig:
    """Settings.

    Attributes:
        site: End of the frozen prefix; nothing is changed there.
    """

    site: str = "layers.-1.ffn.out"


class Idle(Plain):
    """One unused number per edit."""

    Config = IdleConfig
    max_steps = 0
    positionwise = True
    optimizer = OptimizerSettings("sgd", 1.0)

    def __init__(self, config: Any) -> None:
        self.config = config
        self.sites = (config.site,)

    def check(self, backbone: Backbone) -> None:
        backbone.site(self.config.site)

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        return {"nothing": torch.zeros(batch.num_edits, 1)}

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        yield Trace()

    together = applied


EDITOR = Idle
