"""Checkpoints that a run names, the model's and those of an editor that learns: checked before anything starts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from odedit import editors
from odedit.backbones import Backbone, can_inspect, fingerprint, inspect_backbone, load_processor
from odedit.editors.base import Trainable
from odedit.editors.common.weights import load_weights
from odedit.errors import InputError
from odedit.storage.location import locate
from pipeline.config.run import EMBEDDED, BackboneConfig, RunConfig


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


def fitted(config: RunConfig, *, trains: bool = False) -> tuple[RunConfig, list[str]]:
    """The run with the editor's default settings fitted to the model, and a sentence for each change.

    Only settings that the user has not set are changed. The model's files are checked by their headers, and the editor
    against the model; no weights are loaded. A family or an editor from outside the package that offers no such check
    is checked by the workers.

    Args:
        trains: Whether the editor's own weights are still to be made.

    Raises:
        InputError: The model cannot be loaded, or settings of the editor do not fit it.
    """
    if not can_inspect(config.backbone.family):
        load_processor(config.backbone.family, config.backbone.checkpoint)
        return config, []
    model = _inspected(config.backbone, _state(config.backbone.checkpoint))
    kind, choice = editors.find(config.editor.name), config.editor
    replaced = getattr(kind(choice.settings), "fitted", _nothing)(model.num_layers)
    changed = {name: value for name, value in replaced.items() if name not in choice.given}
    notes = [
        f"editor.{name}: the default {_in_words(getattr(choice.settings, name))} is for other models; this one has "
        f"{model.num_layers} layers, and {_in_words(value)} is used."
        for name, value in changed.items()
    ]
    config = replace(config, editor=replace(choice, settings=replace(choice.settings, **changed)))
    editor = kind(config.editor.settings)
    try:
        (editor.with_weights({}) if trains and isinstance(editor, Trainable) else editor).check(model)
    except InputError:
        raise
    except Exception:
        if config.editor.name in editors.names():
            raise
        # An editor from outside the package may look at weights, which this model lacks; a worker checks it again.
    return config, notes


def _nothing(num_layers: int) -> dict[str, Any]:
    return {}


def _in_words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


@lru_cache(maxsize=4)
def _inspected(backbone: BackboneConfig, state: tuple[tuple[str, int, int], ...]) -> Backbone:
    """The model without weights; looked at once for each state of its files."""
    return inspect_backbone(backbone.family, backbone.checkpoint, dtype=backbone.dtype)


def _state(checkpoint: str) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of a local checkpoint's files."""
    folder = Path(checkpoint).expanduser()
    if checkpoint == EMBEDDED or not folder.is_dir():
        return ()
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return tuple((file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)


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
    model = fingerprint(config.backbone.family, config.backbone.checkpoint, dtype=config.backbone.dtype)
    load_weights(path, config.editor.name, editor.weight_settings, model)
    with locate(path, "editor.checkpoint").open() as stream:
        return {"editor.weights": hashlib.file_digest(stream, "sha256").hexdigest()[:16]}
