"""The pictures of the pool as hard negatives, read and encoded once for all edits of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from odedit.backbones import PretrainedProcessor
from odedit.backbones.base import Backbone, is_connector
from odedit.data.fields import image_reference
from odedit.data.images import ImageError
from odedit.data.negatives import NegativePool
from odedit.data.pool import Pool
from odedit.inputs.batch import Picture
from odedit.objectives.base import BaseConfig

_PICTURES_AT_ONCE = 32


def negative_pool(
    config: BaseConfig, backbone: Backbone, read_pool: Callable[[], Pool | None], sites: Sequence[str]
) -> NegativePool | None:
    """Where the objective's hard negatives come from; None if it uses none.

    Args:
        read_pool: Other records, which a run under this objective has; asked if they are needed.
        sites: What the editor changes; decides whether the features are those before the connector.
    """
    if not config.num_negatives:
        return None
    pool = read_pool()
    assert pool is not None, "a run that needs other records does not begin without"
    before = any(map(is_connector, sites))
    features = {}
    pictures = _pictures(pool, backbone.processor)
    while some := list(islice(pictures, _PICTURES_AT_ONCE)):
        for key, feature in backbone.image_features(some, before).items():
            features[key] = feature.cpu()
    return NegativePool(features, config.num_negatives)


def _pictures(pool: Pool, processor: PretrainedProcessor) -> Iterator[Picture]:
    """Each picture of an edit of the pool that can be read, once."""
    seen = set()
    for record in pool.records:
        reference = image_reference(record.fields["image"])
        if reference not in seen:
            seen.add(reference)
            # A picture that cannot be used is no negative either.
            with suppress(ImageError, ValueError):
                yield processor.process(pool.reader.read(reference.path, reference.root))
