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

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from odedit.inputs.batch import NEAR, EditRequest, Picture, Probe


class NegativePool:
    """Image features from which the negatives of every edit are selected.

    Attributes:
        features: Features by picture key, `(L, width)`, from `Backbone.image_features`.
        count: Number of negatives per edit.
        things: Named facts and entities by picture key (`odedit.inputs.batch.things_of`); unnamed ones are missing.
    """

    def __init__(
        self, features: Mapping[str, Tensor], count: int, things: Mapping[str, frozenset[str]] = MappingProxyType({})
    ) -> None:
        self.features, self.count, self.things = features, count, things
        pooled_ND = torch.stack([_pooled(feature) for feature in features.values()]) if features else torch.zeros(0, 1)
        # Centred: the component common to all pictures would dominate the cosines.
        self._mean_D = pooled_ND.mean(0) if features else torch.zeros(1)
        self._unit_ND = functional.normalize(pooled_ND - self._mean_D, dim=1)

    def probes(self, request: EditRequest, feature: Tensor) -> list[Probe]:
        """The edit's question about up to `count` pictures: the record's own near picture first, then the pool's.

        The target is the answer that the edit replaces (`request.replaced`), or the edit's target if that is unknown.
        It sets the compared positions and the weight of a negative: a picture for which the unedited model gives the
        replaced answer as well shows the same thing and is no negative.

        Args:
            feature: Feature of the edit's picture, from the same sites as the pool's, `(L, width)`.
        """
        near = request.supervision.get(NEAR)
        own = [near.picture.key] if near is not None and near.picture is not None else []
        scored = request.kept_things()
        excluded = {picture.key for picture in request.pictures()}
        excluded |= {key for key, things in self.things.items() if things & scored}
        keys = [*own, *self._nearest(feature, excluded, self.count - len(own))][: self.count]
        target = request.replaced or request.edit.target
        return [replace(request.edit, picture=Picture.without_pixels(key), target=target) for key in keys]

    def _nearest(self, feature: Tensor, excluded: Collection[str], count: int) -> list[str]:
        """Keys selected by maximal marginal relevance."""
        keys = list(self.features)
        free_N = torch.tensor([key not in excluded for key in keys], dtype=torch.bool)
        if not bool(free_N.any()):
            return []
        nearness_N = self._unit_ND @ functional.normalize(_pooled(feature) - self._mean_D, dim=0)
        nearness_N = nearness_N.masked_fill(~free_N, -torch.inf)
        likeness_N = torch.zeros_like(nearness_N)
        chosen: list[str] = []
        for _ in range(min(count, int(free_N.sum()))):
            best = int((nearness_N - likeness_N).argmax())
            chosen.append(keys[best])
            likeness_N = torch.maximum(likeness_N, self._unit_ND @ self._unit_ND[best])
            nearness_N[best] = -torch.inf
        return chosen


def _pooled(feature_LD: Tensor) -> Tensor:
    """Mean feature of a picture, `(width,)`, float32 on the CPU."""
    return feature_LD.float().mean(0).cpu()
