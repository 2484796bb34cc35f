"""The model as a run loads it: it remembers the features of its pictures, in the store that the run names if any."""

from __future__ import annotations

import os
from dataclasses import replace

from odedit.backbones import Backbone, load_backbone
from odedit.backbones.common.feature_cache import with_feature_cache
from odedit.backbones.common.feature_store import FeatureStore, Warn
from pipeline.config.run import BackboneConfig, RunConfig

SETTING = "pipeline.feature_store"


def with_checked_store(config: RunConfig) -> RunConfig:
    """The full path of a local store: workers run elsewhere.

    Raises:
        InputError: What the run names cannot be a store.
    """
    text = config.pipeline.feature_store
    if text is None:
        return config
    FeatureStore.at(text, SETTING)
    path = text if "://" in text else os.path.abspath(os.path.expanduser(text))
    return replace(config, pipeline=replace(config.pipeline, feature_store=path))


def warn_anew(backbone: Backbone, warn: Warn) -> None:
    """For the next run of a worker, which has files of its own."""
    store = getattr(backbone, "store", None)
    if store is not None:
        store.warn_through(warn)


def load_remembering(backbone: BackboneConfig, device: str, store: str | None, warn: Warn) -> Backbone:
    """Loads a model. Raises InputError as `load_backbone` and `FeatureStore.at` do.

    Args:
        store: Where features are kept; None: in memory alone.
        warn: As of `FeatureStore`.
    """
    # The run was not begun before the store had answered: a refusal now is one that passes.
    opened = None if store is None else FeatureStore.at(store, SETTING, warn, must_answer=False)
    loaded = load_backbone(backbone.family, backbone.checkpoint, dtype=backbone.dtype, device=device)
    return with_feature_cache(loaded, opened)
