"""Fine-tuning whose worker dies as set in `mode`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from odedit.editors.ftl import FTL, FTLConfig
from odedit.inputs.batch import EditBatch, EditParams


@dataclass(frozen=True)
class FragileConfig(FTLConfig):
    """Settings of the crash.

    Attributes:
        mode: `well`; `always` dies at once, `once` at the first step of `edit`; `raise` fails every edit.
        edit: Id of the edit for `once`.
        marker: File that is written before the death under `once`.
        pause_s: Seconds of pause in every step.
        quick: Edit whose group does not pause.
    """

    mode: str = "well"
    edit: str = ""
    marker: str = ""
    pause_s: float = 0.0
    quick: str = ""


class Fragile(FTL):
    Config: ClassVar[type] = FragileConfig
    own_slots = ("edit",)

    def own_risk(self, params: EditParams, trace: Any, batch: EditBatch) -> Tensor:
        config: Any = self.config
        if config.mode == "always":
            os._exit(1)
        if config.mode == "once" and config.edit in batch.edit_ids and not Path(config.marker).exists():
            Path(config.marker).touch()
            os._exit(1)
        if config.mode == "raise":
            raise ArithmeticError("a number that is none")
        if config.quick not in batch.edit_ids:
            time.sleep(config.pause_s)
        return torch.zeros(batch.num_edits)


EDITOR = Fragile
