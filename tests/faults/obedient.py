"""Fine-tuning that fails as files in a folder order it, so that one configuration serves every fault and none.

An order is an empty file, obeyed in the middle of a group's optimisation.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor

from odedit.editors.ftl import FTL, FTLConfig
from odedit.inputs.batch import EditBatch, EditParams

GROUP = 3
"""Edits per group. Edit ids end in the number of the record."""
HOLD = "hold"
"""Order: the second group waits until the order is deleted; the file `at-<process>` shows that it waits."""
DIE, NARROW = "die", "narrow"
"""Orders followed by `-<edit id>`: kill the edit's process; limit its memory to this one edit."""
REFUSED = "refused"
"""File that shows that an allocation failed."""
_PATIENCE_S = 120.0
_BYTES_OF_ONE = 2**28


@dataclass(frozen=True)
class ObedientConfig(FTLConfig):
    """Settings of FT-L and `orders`, the folder of the orders."""

    orders: str = ""


class Obedient(FTL):
    """FT-L that obeys orders."""

    Config: ClassVar[type] = ObedientConfig
    own_slots = ("edit",)

    def own_risk(self, params: EditParams, trace: Any, batch: EditBatch) -> Tensor:
        folder = Path(self.config.orders)
        if (folder / HOLD).exists():
            _hold(folder, group_of(batch.edit_ids[0]))
        for edit_id in batch.edit_ids:
            if (folder / f"{DIE}-{edit_id}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if (folder / f"{NARROW}-{edit_id}").exists():
                _take_memory(batch.num_edits, folder)
        return super().own_risk(params, trace, batch)


def group_of(edit_id: str) -> int:
    return int(edit_id.rpartition("-")[2]) // GROUP


def _hold(folder: Path, group: int) -> None:
    (folder / f"begun-{group}").touch()
    if len(list(folder.glob("begun-*"))) < 2:
        return
    (folder / f"at-{os.getpid()}").touch()
    begun = time.monotonic()
    while (folder / HOLD).exists():
        if time.monotonic() - begun > _PATIENCE_S:
            raise TimeoutError(f"{HOLD} is still there")
        time.sleep(0.02)


def _take_memory(num_edits: int, folder: Path) -> None:
    """Allocates memory for `num_edits` edits, under a limit that allows one and a half."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + _BYTES_OF_ONE * 3 // 2
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        torch.zeros(num_edits, _BYTES_OF_ONE, dtype=torch.uint8)
    except RuntimeError:
        (folder / REFUSED).touch()
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


EDITOR = Obedient
