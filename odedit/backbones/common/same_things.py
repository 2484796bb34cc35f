"""Pictures of the same thing, as the unedited model sees them: it gives the same answer about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.inputs.batch import Picture, Probe, negative_slots
from odedit.inputs.prompts import Template

_TOO_COMMON = 0.5
"""Share of the pictures from which an answer, such as yes, does not tell that a picture shows the same thing."""


@torch.no_grad()
def same_things(
    backbone: Backbone,
    edit_ids: Sequence[str],
    asked: Sequence[Sequence[Probe]],
    features: Mapping[str, Tensor],
    template: Template,
    before_connector: bool = False,
) -> list[list[Picture]]:
    """Pictures, by request, about which the model greedily gives the probe's target, in the given order.

    None for a request whose target it gives about more than half of its pictures: it does not tell them apart.

    Args:
        asked: Questions about pictures, by request; without edits applied, the target is the unedited answer.
        features: Image features by the picture's key.
        before_connector: Whether `features` are inputs of the connector.
    """
    width = max(map(len, asked), default=0)
    if not width:
        return [[] for _ in asked]
    found = []
    for edit_id, probes in zip(edit_ids, asked, strict=True):  # one at a time, to bound the peak memory
        grid: list[list[Probe | None]] = [[*probes, *[None] * (width - len(probes))]]
        batch = backbone.encode([edit_id], negative_slots(width), grid, features, template, before_connector)
        prefix = backbone.prefix(batch, *(backbone.connector_sites() if before_connector else ("layers.-1.ffn.out",)))
        states_KTD = backbone.suffix(prefix, batch.predict_EKT)[0]
        first_KT = torch.stack([backbone.head(states_TD).argmax(dim=-1) for states_TD in states_KTD])
        is_same_K = ((first_KT == batch.target_EKT[0]) | ~batch.counted_EKT[0]).all(dim=-1)
        pairs = zip(probes, is_same_K.tolist(), strict=False)
        same = [probe.picture for probe, is_same in pairs if is_same and probe.picture is not None]
        found.append([] if len(same) > _TOO_COMMON * len(probes) else same)
    return found
