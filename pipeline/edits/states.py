"""Hidden states of edits and their rephrases, without and with each edit."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from odedit.backbones import encode_requests, load_backbone
from odedit.editing.files import load_edits
from odedit.errors import InputError
from odedit.evaluation.statistics import MAIN
from odedit.inputs.batch import RELIABILITY, EditBatch, EditParams
from odedit.inputs.prompts import find_template
from pipeline.config.run import from_dict, read_yaml
from pipeline.report.cloud import HiddenStates
from pipeline.run_folder import rows, staging
from pipeline.run_folder.sources import resolve
from pipeline.run_folder.workspace import Workspace
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Preparer

PROBES = (RELIABILITY, *(name for name in MAIN if name.endswith("_gen")))
"""The edit itself and its rephrases."""


def hidden_states(workspace: Workspace, edit_ids: Collection[str] | None = None, device: str = "cpu") -> HiddenStates:
    """Loads a run's model and asks it the questions of its edits.

    Args:
        edit_ids: Edits to ask; None: all. Records that were not edited are left out.

    Raises:
        InputError: The run did not keep its edits, or has none.
    """
    config = from_dict(read_yaml(workspace.config))
    edited = {
        row["edit_id"]
        for row in rows.read_rows(rows.parts(workspace), ("edit_id", "status"), (rows.EDITED,))
        if edit_ids is None or row["edit_id"] in edit_ids
    }
    if not edited or not all(workspace.edit(edit_id).exists() for edit_id in edited):
        raise InputError(
            f"{workspace.out}: hidden states are those of the run's single edits, and their files are not there. "
            "Run `odedit edit` with keep_edits=true."
        )
    model = config.backbone
    backbone = load_backbone(
        model.family, model.checkpoint, dtype=model.dtype, device=device, image_size=model.image_size,
        gpus=model.gpus if device.startswith("cuda") else 1,
    )  # fmt: skip
    ids: list[str] = []
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    prepare = Preparer(Job(config, resolve(config.data, config.out, config.supervision.rephrases), workspace))
    for group in range(len(staging.read_staged(workspace.records).usable)):
        requests = [request for request in prepare(group).requests if request.edit_id in edited]
        if not requests:
            continue
        editor, params, _ = load_edits([workspace.edit(request.edit_id) for request in requests], backbone)
        _, batch = encode_requests(backbone, requests, find_template(config.data.template), editor.sites)
        ids += [request.edit_id for request in requests]
        with torch.no_grad():
            before.append(_first_token(backbone, editor, batch))
            after.append(_first_token(backbone, editor, batch, params))
    return HiddenStates(tuple(ids), PROBES, np.concatenate(before, axis=1), np.concatenate(after, axis=1))


def _first_token(backbone: Any, editor: Any, batch: EditBatch, params: EditParams | None = None) -> np.ndarray:
    """States of the probes, [probes, edits, hidden]; NaN where an edit lacks one."""
    present = [name for name in PROBES if name in batch.slots]
    asked = batch.select(present)
    with nullcontext() if params is None else editor.applied(backbone, params, asked):
        states_EKD = backbone.suffix(backbone.prefix(asked, *editor.sites), asked.predict_EKT)[:, :, 0].float()
    is_asked_EK = asked.target_mask_EKT.any(-1)
    states_EKD = states_EKD.masked_fill(~is_asked_EK.unsqueeze(-1), math.nan).cpu()
    shape = (len(PROBES), batch.num_edits, states_EKD.shape[-1])
    every = np.full(shape, math.nan, dtype=np.float32)
    every[[PROBES.index(name) for name in present]] = states_EKD.transpose(0, 1).numpy()
    return every
