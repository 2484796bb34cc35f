"""Training records in memory: requests without pixels, and the image features, computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from odedit.backbones import encode_supervision, is_connector
from odedit.backbones.base import Backbone
from odedit.backbones.common.same_things import with_same_things
from odedit.data.negatives import NegativePool
from odedit.inputs.batch import EditBatch, EditRequest, Probe
from odedit.inputs.prompts import Template


class EncodedRequests:
    """Requests that training draws by index, without their probes.

    Image features stay in main memory (160 KiB per picture in half precision, for 32 positions of width 2560); tokens
    are encoded anew for every batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        template: Template,
        sites: Sequence[str] = (),
        requests: Sequence[EditRequest] = (),
        negatives: NegativePool | None = None,
        joined: bool = False,
    ) -> None:
        """
        Args:
            sites: Sites of the editor; with a site in the connector, features before the connector are stored.
            negatives: Pool of hard negatives.
            joined: Whether to join text and image rephrases; always with negatives.
        """
        self._backbone = backbone
        self._template = template
        self._negatives, self._joined = negatives, joined
        self._before = any(is_connector(site) for site in sites)
        self._requests: list[EditRequest] = []
        self._features: dict[str, Tensor] = {}
        self._device = torch.device("cpu")
        self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> None:
        """Appends requests, and runs the image tower on new pictures."""
        kept = [replace(request, probes={}) for request in requests]
        pictures = {picture.key: picture for request in kept for picture in request.pictures()}
        new = [picture for key, picture in pictures.items() if key not in self._features]
        for key, feature in self._backbone.image_features(new, self._before).items():
            self._device = feature.device
            self._features[key] = feature.cpu()
        if self._negatives is not None and kept:
            found, features = with_same_things(
                self._backbone, kept, self._on_device(pictures), self._template, self._negatives, self._before
            )
            kept = list(found)
            self._features |= {key: value.cpu() for key, value in features.items() if key not in self._features}
        self._requests += [_without_pixels(request) for request in kept]

    def _on_device(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._features[key].to(self._device) for key in keys}

    def __len__(self) -> int:
        return len(self._requests)

    def batch(self, numbers: Sequence[int]) -> EditBatch:
        """Supervision batch of these requests."""
        requests = [self._requests[number] for number in numbers]
        keys = dict.fromkeys(picture.key for request in requests for picture in request.pictures())
        features = self._on_device(keys)
        return encode_supervision(
            self._backbone, requests, features, self._template, self._before, self._negatives, self._joined
        )


def _without_pixels(request: EditRequest) -> EditRequest:
    def bare(probe: Probe) -> Probe:
        picture = probe.picture
        return probe if picture is None else replace(probe, picture=picture.without_its_pixels())

    supervision = {slot: bare(probe) for slot, probe in request.supervision.items()}
    return replace(request, edit=bare(request.edit), supervision=supervision)
