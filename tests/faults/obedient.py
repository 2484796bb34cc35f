"""Plain fine-tuning that does what files in a folder tell it: one configuration meets every fault, and none.

An order is an empty file, obeyed in the middle of the optimisation of a group.
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
"""Edits of a group; the ids end in their number."""
HOLD = "hold"
"""The second group that is begun waits until the order is gone; a file `at-<process>` says that it does."""
DIE, NARROW = "die", "narrow"
"""With an edit's id behind a dash: its process dies by SIGKILL; its process has memory for this edit and no other."""
REFUSED = "refused"
"""A file that says that the system had no memory to give."""
_PATIENCE_S = 120.0
_BYTES_OF_ONE = 2**28


@dataclass(frozen=True)
class ObedientConfig(FTLConfig):
    """Adds: folder of the orders."""

    orders: str = ""


class Obedient(FTL):
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
    """Asks the system, which gives this process no more than one edit and a half takes, for that of so many."""
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
