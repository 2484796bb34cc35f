"""Hard negatives: pictures that are near to the edit's own and show something else.

An edit of "who owns this?" spills over to what looks like the thing it is about, and one unrelated picture says little
about where to. Which pictures are in danger shows in the features that the text model reads: of a pool of pictures
those are taken that are nearest to the edit's and unlike one another, by maximal marginal relevance: each next one has
the largest cosine with the edit's picture, less its largest with one of the pool that was taken already, if that is
above 0. For an editor of the connector the features are those that enter it.

References:
    The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing Summaries (Carbonell and
    Goldstein, 1998), with both weights equal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from odedit.inputs.batch import NEAR, EditRequest, Picture, Probe


class NegativePool:
    """Features of pictures that serve every edit of a run.

    Attributes:
        features: By the picture's key, `(L, width)`, as `Backbone.image_features` gives them.
        count: Negatives of an edit.
    """

    def __init__(self, features: Mapping[str, Tensor], count: int) -> None:
        self.features, self.count = features, count
        pooled_ND = torch.stack([_pooled(feature) for feature in features.values()]) if features else torch.zeros(0, 1)
        # What all pictures have in common says nothing about which are near.
        self._mean_D = pooled_ND.mean(0) if features else torch.zeros(1)
        self._unit_ND = functional.normalize(pooled_ND - self._mean_D, dim=1)

    def probes(self, request: EditRequest, feature: Tensor) -> list[Probe]:
        """The edit's own question about up to `count` pictures: the record's own near one first, then the pool's.

        Their target, which says where answers are compared and what weighs a negative down, is the answer that the
        edit replaces: a picture for which the unedited model gives it too shows the same thing, and is no negative.
        Where nothing is said of it, the edit's own target stands in.

        Args:
            feature: Of the edit's picture, for the same sites as the pool's.
        """
        near = request.supervision.get(NEAR)
        own = [near.picture.key] if near is not None and near.picture is not None else []
        taken = {picture.key for picture in request.pictures()}
        keys = [*own, *self._near(feature, taken, self.count - len(own))][: self.count]
        target = request.replaced or request.edit.target
        return [replace(request.edit, picture=Picture.without_pixels(key), target=target) for key in keys]

    def _near(self, feature: Tensor, taken: Collection[str], count: int) -> list[str]:
        keys = list(self.features)
        free_N = torch.tensor([key not in taken for key in keys], dtype=torch.bool)
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
    """One vector for a picture, on the host: which are near is no work for a GPU."""
    return feature_LD.float().mean(0).cpu()
