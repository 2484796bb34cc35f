"""Files of weights that a run names: the model's, and those that an editor has learned."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from odedit import editors
from odedit.backbones import fingerprint
from odedit.editor_weights import load_weights
from odedit.editors.base import Trainable
from odedit.locations import locate
from pipeline.config import EMBEDDED, RunConfig


def with_absolute_checkpoints(config: RunConfig) -> RunConfig:
    """Full paths of a local model and of an editor's weights: workers run elsewhere, and so may `odedit apply`."""
    path = Path(config.backbone.checkpoint).expanduser()
    if config.backbone.checkpoint != EMBEDDED and path.is_dir():
        config = replace(config, backbone=replace(config.backbone, checkpoint=str(path.absolute())))
    weights = getattr(config.editor.settings, "checkpoint", None)
    if isinstance(weights, str) and "://" not in weights:
        settings = replace(config.editor.settings, checkpoint=str(Path(weights).expanduser().absolute()))
        config = replace(config, editor=replace(config.editor, settings=settings))
    return config


def editor_weights(config: RunConfig) -> dict[str, str]:
    """A hash of the weights that an editor has learned, if it is one that learns.

    Raises:
        InputError: It has none, or the file is missing, damaged, or was trained for something else. Better said now
            than by a worker.
    """
    editor = editors.find(config.editor.name)(config.editor.settings)
    if not isinstance(editor, Trainable):
        return {}
    path = config.editor.settings.checkpoint
    model = fingerprint(config.backbone.family, config.backbone.checkpoint)
    load_weights(path, config.editor.name, editor.weight_settings, model)
    with locate(path, "editor.checkpoint").open() as stream:
        return {"editor.weights": hashlib.file_digest(stream, "sha256").hexdigest()[:16]}
