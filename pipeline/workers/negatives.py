"""Hard negatives: the features of the pool's pictures, computed once for all edits of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from odedit.backbones import PretrainedProcessor
from odedit.backbones.base import Backbone, is_connector
from odedit.data.fields import ImageReference, image_reference
from odedit.data.images import ImageError
from odedit.data.negatives import NegativePool
from odedit.data.pool import Pool
from odedit.inputs.batch import Picture, things_of
from odedit.objectives.base import BaseConfig

_PICTURES_AT_ONCE = 32


def negative_pool(
    config: BaseConfig, backbone: Backbone, read_pool: Callable[[], Pool | None], sites: Sequence[str]
) -> NegativePool | None:
    """Pool of the objective's hard negatives; None if it uses none.

    Args:
        read_pool: Reads the pool of records; called only if the objective uses hard negatives.
        sites: Sites that the editor changes. If one is in the connector, the features are the connector's inputs.
    """
    if not config.num_negatives:
        return None
    pool = read_pool()
    assert pool is not None, "preflight refuses a run without the pool that its objective needs"
    before_connector = any(map(is_connector, sites))
    features = {}
    things: dict[str, frozenset[str]] = {}
    pictures = _pictures(pool, backbone.processor, things)
    while batch := list(islice(pictures, _PICTURES_AT_ONCE)):
        for key, feature in backbone.image_features(batch, before_connector).items():
            features[key] = feature.cpu()
    # The records' own pictures are edited each by itself: none is trained to the new answer of another.
    positives = 0 if pool.is_own else config.num_positives
    return NegativePool(features, config.num_negatives, things, positives)


def _pictures(pool: Pool, processor: PretrainedProcessor, things: dict[str, frozenset[str]]) -> Iterator[Picture]:
    """The distinct pictures of the pool's edits; those that cannot be read are left out.

    Args:
        things: Named facts and entities by picture key, extended here.
    """
    keys: dict[ImageReference, str | None] = {}
    for record in pool.records:
        reference = image_reference(record.fields["image"])
        if reference not in keys:
            keys[reference] = None
            with suppress(ImageError, ValueError):
                picture = processor.process(pool.reader.read(reference.path, reference.root))
                keys[reference] = picture.key
                yield picture
        key = keys[reference]
        named = things_of(record.fields.get("fact"), record.fields.get("entity"))
        if key is not None and named:
            things[key] = things.get(key, frozenset()) | named
