"""The base bandwidth sigma_0^2 of the RBF kernel, measured on unedited states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from odedit.backbones import encode_requests
from odedit.backbones.base import Backbone
from odedit.inputs.batch import EDIT, REPHRASE_SLOTS, EditRequest
from odedit.inputs.prompts import Template
from odedit.risks import mmd

CALIBRATION_STATES = 256
"""Largest number of states that are measured."""


@torch.no_grad()
def calibrate(
    backbone: Backbone, requests: Sequence[EditRequest], template: Template, positions: str = "target"
) -> float:
    """Mean squared distance between unedited states of edits and rephrases, sigma_0^2.

    It is measured once per run, on other records than the edited ones: a bandwidth measured on the compared pair would
    make the loss constant for answers of one token.

    Args:
        requests: Records for up to `CALIBRATION_STATES` states; further states are dropped.
        positions: States at the positions that predict the `target`, or at all of the prompt's `text`.

    Raises:
        ValueError: Fewer than two states, or all states are equal.
    """
    supervision, _ = encode_requests(backbone, requests, template)
    batch = supervision.select((EDIT, *REPHRASE_SLOTS))
    prefix = backbone.prefix(batch, f"layers.{backbone.num_layers - 1}.ffn.out", positionwise=True)
    if positions == "target":
        states = backbone.suffix(prefix, batch.predict_EKT)[batch.target_mask_EKT]
    else:
        states = backbone.suffix(prefix)[batch.prompt_EKS & ~batch.image_EKS]
    distance = float(mmd.mean_squared_distance(states[:CALIBRATION_STATES].float()))
    if not distance > 0:
        raise ValueError("sigma_0^2 cannot be measured: all states of the calibration records are the same.")
    return distance
