"""The model that a run loads, with a cache of image features and the feature store that the run names."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from odedit.backbones import Backbone, load_backbone
from odedit.backbones.common.feature_cache import with_feature_cache
from odedit.backbones.common.feature_store import FeatureStore, Warn
from odedit.evaluation.readout import UneditedAnswers
from pipeline.config.run import BackboneConfig, RunConfig

SETTING = "pipeline.feature_store"
_loaded: dict[tuple[BackboneConfig, str, str | None], Backbone] = {}
"""The model of this process's last run, if it is an editing worker."""
_answers: WeakKeyDictionary[Backbone, UneditedAnswers] = WeakKeyDictionary()


def with_checked_store(config: RunConfig) -> RunConfig:
    """The configuration with the full path of a local feature store, since workers have other working directories.

    Raises:
        InputError: The path or address cannot be a feature store.
    """
    text = config.pipeline.feature_store
    if text is None:
        return config
    FeatureStore.at(text, SETTING)
    path = text if "://" in text else os.path.abspath(os.path.expanduser(text))
    return replace(config, pipeline=replace(config.pipeline, feature_store=path))


def load_with_feature_cache(backbone: BackboneConfig, device: str, store: str | None, warn: Warn) -> Backbone:
    """Loads a model that caches the features of its pictures. Raises InputError as `load_backbone` does.

    Args:
        store: Path or address of the feature store; None: features are cached in memory only.
        warn: Callback for warnings of the store, as in `FeatureStore`.
    """
    # The driver has tested the store before the run, so a failure now is transient.
    opened = None if store is None else FeatureStore.at(store, SETTING, warn, must_answer=False)
    loaded = load_backbone(
        backbone.family,
        backbone.checkpoint,
        dtype=backbone.dtype,
        device=device,
        image_size=backbone.image_size,
        gpus=backbone.gpus,
    )
    return with_feature_cache(loaded, opened)


def worker_backbone(backbone: BackboneConfig, device: str, store: str | None, warn: Warn) -> Backbone:
    """The model of the worker's previous run, with its cached features, if it is the same model; else a new one.

    At most one model is kept. The arguments are those of `load_with_feature_cache`.
    """
    key = (backbone, device, store)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_with_feature_cache(*key, warn=warn)
    elif (feature_store := getattr(_loaded[key], "store", None)) is not None:
        feature_store.warn_through(warn)  # writes to the files of this run
    return _loaded[key]


def unedited_answers(backbone: Backbone) -> UneditedAnswers:
    """Store of the answers of a model without edits, which lives as long as the model."""
    return _answers.setdefault(backbone, UneditedAnswers())


def forget() -> None:
    """Drops the model of the process's last run, and its memory on a GPU."""
    if _loaded:
        _loaded.clear()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
