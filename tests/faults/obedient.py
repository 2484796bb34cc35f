"""Plain fine-tuning that does what files in a folder tell it: one configuration meets every fault, and none.

An order is an empty file `<order>-<edit id>`, obeyed in the middle of the optimisation of that edit's batch.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from odedit.editors.ftl import FTL, FTLConfig
from odedit.edits import EditBatch, EditParams

DIE, HOLD, NARROW = "die", "hold", "narrow"
"""Die by SIGKILL; leave a file `at-<edit id>-<process>` and wait until the order is gone; run out of memory unless the
edit is alone."""
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class ObedientConfig(FTLConfig):
    """Adds: folder of the orders."""

    orders: str = ""


class Obedient(FTL):
    Config: ClassVar[type] = ObedientConfig
    own_slots = ("edit",)

    def own_risk(self, params: EditParams, trace: Any, batch: EditBatch) -> Tensor:
        folder = Path(self.config.orders)
        for edit_id in batch.edit_ids:
            if (folder / f"{DIE}-{edit_id}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if (folder / f"{NARROW}-{edit_id}").exists() and batch.num_edits > 1:
                raise torch.OutOfMemoryError("no room for more than one")
            if (folder / f"{HOLD}-{edit_id}").exists():
                (folder / f"at-{edit_id}-{os.getpid()}").touch()
                _wait_until_gone(folder / f"{HOLD}-{edit_id}")
        return super().own_risk(params, trace, batch)


def _wait_until_gone(path: Path) -> None:
    begun = time.monotonic()
    while path.exists():
        if time.monotonic() - begun > _PATIENCE_S:
            raise TimeoutError(f"{path.name} is still there")
        time.sleep(0.02)


EDITOR = Obedient
