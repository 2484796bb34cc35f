"""Pictures of the same thing, as the unedited model sees them: it gives the same answer about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.data.negatives import NegativePool
from odedit.inputs.batch import REPHRASE_SLOTS, EditBatch, EditRequest, Picture, Probe, negative_slots, numbered
from odedit.inputs.prompts import Template

TOO_COMMON = 0.5
"""Share of the pictures from which an answer, such as yes, does not tell that a picture shows the same thing."""
_REQUESTS_AT_ONCE = 8
"""Requests whose pictures are asked about at a time, to bound the peak memory."""


def with_same_things(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    features: Mapping[str, Tensor],
    template: Template,
    pool: NegativePool,
    before_connector: bool = False,
) -> tuple[Sequence[EditRequest], Mapping[str, Tensor]]:
    """Requests with up to `pool.positives` pool pictures of the same thing, and the features of all their pictures.

    Each picture becomes a further image rephrase, its text rephrase the edit's own question.

    Args:
        features: Image features of the requests' pictures, by key.
        before_connector: Whether `features` are inputs of the connector.
    """
    if not pool.positives:
        return requests, features
    asked = of_pool(requests, features, pool.candidates)
    of_asked = with_pool_features(features, asked, pool)
    same = same_things(backbone, [r.edit_id for r in requests], asked, of_asked, template, before_connector)
    chosen = {picture.key for pictures in same for picture in pictures[: pool.positives]}
    extended = []
    for request, pictures in zip(requests, same, strict=True):
        supervision = dict(request.supervision)
        for number, picture in enumerate(pictures[: pool.positives], start=request.num_rephrases + 1):
            text, image = (numbered(slot, number) for slot in REPHRASE_SLOTS)
            supervision |= {text: request.edit, image: replace(request.edit, picture=picture)}
        extended.append(replace(request, supervision=supervision))
    return extended, {**features, **{key: of_asked[key] for key in sorted(chosen)}}


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
    found: list[list[Picture]] = []
    for first in range(0, len(asked), _REQUESTS_AT_ONCE):
        part = asked[first : first + _REQUESTS_AT_ONCE]
        width = max(map(len, part))
        if not width:
            found += [[] for _ in part]
            continue
        grid: list[list[Probe | None]] = [[*probes, *[None] * (width - len(probes))] for probes in part]
        ids = edit_ids[first : first + _REQUESTS_AT_ONCE]
        shown = {key: features[key] for key in _keys(part)}
        batch = backbone.encode(ids, negative_slots(width), grid, shown, template, before_connector)
        for probes, gives_K in zip(part, _gives_target(backbone, batch).tolist(), strict=True):
            pairs = zip(probes, gives_K, strict=False)
            same = [probe.picture for probe, gives in pairs if gives and probe.picture is not None]
            found.append([] if len(same) > TOO_COMMON * len(probes) else same)
    return found


def _gives_target(backbone: Backbone, batch: EditBatch) -> Tensor:
    """True where every counted token of the target is the model's first choice after those before it, `(E, K)`."""
    sites = backbone.connector_sites() if batch.before_connector else ("layers.-1.ffn.out",)
    states_EKTD = backbone.suffix(backbone.prefix(batch, *sites), batch.predict_EKT)
    is_first_EKT = torch.zeros_like(batch.counted_EKT)
    is_first_EKT[batch.counted_EKT] = (
        backbone.head(states_EKTD[batch.counted_EKT]).argmax(dim=-1) == batch.target_EKT[batch.counted_EKT]
    )
    return (is_first_EKT | ~batch.counted_EKT).all(dim=-1) & batch.present_EK


def of_pool(
    requests: Sequence[EditRequest],
    features: Mapping[str, Tensor],
    choose: Callable[[EditRequest, Tensor], list[Probe]],
) -> list[list[Probe]]:
    """Questions about pool pictures for every request; none for a request without picture."""
    pictures = [request.edit.picture for request in requests]
    return [
        [] if picture is None else choose(request, features[picture.key])
        for request, picture in zip(requests, pictures, strict=True)
    ]


def with_pool_features(
    features: Mapping[str, Tensor], probes: Sequence[Sequence[Probe]], pool: NegativePool
) -> Mapping[str, Tensor]:
    """The features and those of the pool pictures that the probes show."""
    device = next((feature.device for feature in features.values()), None)
    return {key: pool.features[key].to(device) for key in _keys(probes) if key not in features} | dict(features)


def _keys(probes: Sequence[Sequence[Probe]]) -> dict[str, None]:
    """Distinct keys of the probes' pictures, in order."""
    return dict.fromkeys(probe.picture.key for of_one in probes for probe in of_one if probe.picture is not None)
