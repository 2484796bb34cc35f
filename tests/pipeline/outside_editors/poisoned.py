"""Fine-tuning that fails in a way chosen by the edit id. Tests name it by its module."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from odedit.editors.ftl import EDITOR as Base
from odedit.inputs.batch import EditBatch, EditParams


class WorkerDeath(BaseException):
    """Simulates a worker's death: no handler of `Exception` catches it."""


class Poisoned(Base):  # type: ignore[misc,valid-type]
    """FT-L with failures, by the start of the edit id."""

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
