"""Hard negatives: pictures whose features are close to those of the edit's picture, but that show something else.

An edit of "who owns this?" spills over to pictures that look like the edited one; one random unrelated picture rarely
covers them. Negatives are selected from a pool by maximal marginal relevance over the image features that the text
model reads: each step takes the picture with the largest cosine to the edit's picture, minus its largest cosine to an
already selected one (at least 0). For an editor of the connector, the features are the connector's input.

A picture of a thing whose answer is scored for this edit is no negative of it, where the records name the things.

References:
    The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing Summaries (Carbonell and
    Goldstein, 1998), with both weights equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from odedit.inputs.batch import NEAR, EditRequest, Picture, Probe

CANDIDATES = 16
"""Nearest pictures among which those of the same thing are searched."""


class NegativePool:
    """Image features from which the negatives of every edit are selected.

    Attributes:
        features: Features by picture key, `(L, width)`, from `Backbone.image_features`.
        count: Number of negatives per edit.
        things: Named facts and entities by picture key (`odedit.inputs.batch.things_of`); unnamed ones are missing.
        positives: Number of pictures of the same thing that are trained to the new answer.
    """

    def __init__(
        self,
        features: Mapping[str, Tensor],
        count: int,
        things: Mapping[str, frozenset[str]] = MappingProxyType({}),
        positives: int = 0,
    ) -> None:
        self.features, self.count, self.things, self.positives = features, count, things, positives
        pooled_ND = torch.stack([_pooled(feature) for feature in features.values()]) if features else torch.zeros(0, 1)
        # Centred: the component common to all pictures would dominate the cosines.
        self._mean_D = pooled_ND.mean(0) if features else torch.zeros(1)
        self._unit_ND = functional.normalize(pooled_ND - self._mean_D, dim=1)

    def probes(self, request: EditRequest, feature: Tensor) -> list[Probe]:
        """The edit's question about up to `count` pictures: the record's own near picture first, then the pool's.

        The target is the answer that the edit replaces (`request.replaced`), or the edit's target if that is unknown.
        It sets the compared positions, and tells pictures of the same thing: those about which the unedited model gives
        the replaced answer as well.

        Args:
            feature: Feature of the edit's picture, from the same sites as the pool's, `(L, width)`.
        """
        near = request.supervision.get(NEAR)
        own = [near.picture.key] if near is not None and near.picture is not None else []
        keys = [*own, *self._unlike(request, feature, self.count - len(own))][: self.count]
        return [_about(request, key) for key in keys]

    def candidates(self, request: EditRequest, feature: Tensor) -> list[Probe]:
        """The edit's question about the pool's nearest pictures, with the replaced answer as target.

        Those about which the unedited model gives this answer show the same thing. None if the answer is unknown.
        """
        if request.replaced is None or not self.positives:
            return []
        nearness_N = self._nearness(request, feature)
        nearest = nearness_N.topk(min(CANDIDATES, len(nearness_N)))
        keys = list(self.features)
        chosen = zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)
        return [_about(request, keys[index]) for value, index in chosen if value > -math.inf]

    def _nearness(self, request: EditRequest, feature: Tensor) -> Tensor:
        """Cosine of every picture to the edit's, `(N,)`; -inf for pictures of the request and of scored things."""
        scored, own = request.kept_things(), {picture.key for picture in request.pictures()}
        is_out = [key in own or bool(scored & self.things.get(key, frozenset())) for key in self.features]
        nearness_N = self._unit_ND @ functional.normalize(_pooled(feature) - self._mean_D, dim=0)
        return nearness_N.masked_fill(torch.tensor(is_out, dtype=torch.bool), -torch.inf)

    def _unlike(self, request: EditRequest, feature: Tensor, count: int) -> list[str]:
        """Keys selected by maximal marginal relevance."""
        keys = list(self.features)
        if not keys:
            return []
        nearness_N = self._nearness(request, feature)
        likeness_N = torch.zeros_like(nearness_N)
        chosen: list[str] = []
        for _ in range(min(count, int(nearness_N.isfinite().sum()))):
            best = int((nearness_N - likeness_N).argmax())
            chosen.append(keys[best])
            likeness_N = torch.maximum(likeness_N, self._unit_ND @ self._unit_ND[best])
            nearness_N[best] = -torch.inf
        return chosen


def _about(request: EditRequest, key: str) -> Probe:
    """The edit's question about a pool picture, with the replaced answer."""
    target = request.replaced or request.edit.target
    return replace(request.edit, picture=Picture.without_pixels(key), target=target)


def _pooled(feature_LD: Tensor) -> Tensor:
    """Mean feature of a picture, `(width,)`, float32 on the CPU."""
    return feature_LD.float().mean(0).cpu()
