"""Fine-tuning in which edits fail in the way that their id names. Tests name it by its dotted module."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from odedit.editors.ftl import EDITOR as Base
from odedit.inputs.batch import EditBatch, EditParams


class WorkerDeath(BaseException):
    """Simulates a dead worker: `except Exception` does not catch it."""


class Poisoned(Base):  # type: ignore[misc,valid-type]
    """Editor whose edits fail by the prefix of their id: nan, raise, cuda, die, exit, large."""

    own_slots = ("edit",)

    def own_risk(self, params: EditParams, trace: Any, batch: EditBatch) -> Tensor:
        risk = torch.zeros(batch.num_edits)
        for index, edit_id in enumerate(batch.edit_ids):
            if edit_id.startswith("nan"):
                risk[index] = torch.nan
            if edit_id.startswith("raise"):
                raise ArithmeticError("a number that\nis none")
            if edit_id.startswith("cuda"):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if edit_id.startswith("die"):
                raise WorkerDeath
            if edit_id.startswith("exit"):
                os._exit(1)
            if edit_id.startswith("large") and batch.num_edits > 1:
                raise torch.OutOfMemoryError("no room")
        return risk


EDITOR = Poisoned
