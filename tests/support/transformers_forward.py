"""The library's forward of single sequences, without prefix, hooks or batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from odedit import EditRequest
from odedit.inputs.batch import EDIT, RELIABILITY, EditBatch


def copy_of(backbone: Any) -> Any:
    """A copy of the model without gradients. Call it outside `applied`, because hooks are copied too."""
    return copy.deepcopy(backbone.model)


def library_logits(model: Any, backbone: Any, batch: EditBatch, request: EditRequest, e: int, slot: str) -> Tensor:
    """Logits `(length, V)` of one sequence of a BLIP-2 batch."""
    k = batch.slots.index(slot)
    ids = batch.tokens_EKS[e, k][batch.real_EKS[e, k]][None]
    probe = request.edit if slot in (EDIT, RELIABILITY) else {**request.supervision, **request.probes}[slot]
    if probe.picture is None:
        return model.language_model(input_ids=ids).logits[0]
    pixels = torch.from_numpy(backbone.processor.process(probe.picture).pixels)[None]
    return model(pixel_values=pixels, input_ids=ids).logits[0]


def library_nll(model: Any, backbone: Any, batch: EditBatch, request: EditRequest, e: int) -> Tensor:
    """Mean negative log-likelihood of the edit's target tokens."""
    log_p = library_logits(model, backbone, batch, request, e, EDIT).log_softmax(dim=-1)
    k = batch.slots.index(EDIT)
    at = batch.predict_EKT[e, k][batch.target_mask_EKT[e, k]].tolist()
    targets = batch.target_EKT[e, k][batch.target_mask_EKT[e, k]].tolist()
    return -torch.stack([log_p[t, v] for t, v in zip(at, targets, strict=True)]).mean()
