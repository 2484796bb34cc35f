"""Checks, before workers start, of the model's checkpoint and of an editor's trained weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from odedit import editors
from odedit.backbones import Backbone, can_inspect, fingerprint, inspect_backbone, load_processor
from odedit.editing.memory import Needed, needed
from odedit.editors.base import Trainable
from odedit.editors.common.weights import load_weights
from odedit.errors import InputError
from odedit.inputs.batch import Picture, Probe
from odedit.inputs.prompts import find_template
from odedit.storage.location import locate
from pipeline.config.run import AUTO, EMBEDDED, BackboneConfig, RunConfig

_SIZE = (480, 640)
_COUNTED = frozenset({"attention.out", "ffn.out"})
_QUESTION, _ANSWER = "What is the person on the left of the picture holding?", "a red umbrella"


def with_absolute_checkpoints(config: RunConfig) -> RunConfig:
    """The run with the family of its checkpoint, and full paths of local ones, valid in any current folder."""
    config = replace(config, backbone=config.backbone.with_family)
    path = Path(config.backbone.checkpoint).expanduser()
    if config.backbone.checkpoint != EMBEDDED and path.is_dir():
        config = replace(config, backbone=replace(config.backbone, checkpoint=str(path.absolute())))
    weights = getattr(config.editor.settings, "checkpoint", None)
    if isinstance(weights, str) and "://" not in weights:
        settings = replace(config.editor.settings, checkpoint=str(Path(weights).expanduser().absolute()))
        config = replace(config, editor=replace(config.editor, settings=settings))
    return config


def fitted(config: RunConfig, *, trains: bool = False) -> tuple[RunConfig, list[str]]:
    """Fits the editor's default settings to the model: the run, and a sentence for each changed setting.

    Settings given by the user stay. Checks the headers of the model's files, and the editor against the model, without
    loading weights. Plug-ins from outside the package that offer no such check are checked by the workers.

    Args:
        trains: Whether the run is to train the editor's own weights, which then need not exist.

    Raises:
        InputError: The model cannot be loaded, or settings of the editor do not fit it.
    """
    if not can_inspect(config.backbone.family):
        load_processor(config.backbone.family, config.backbone.checkpoint, image_size=config.backbone.image_size)
        return config, []
    model = _inspected(config.backbone, _state(config.backbone.checkpoint))
    kind, choice = editors.find(config.editor.name), config.editor
    replaced = getattr(kind(choice.settings), "fitted", _nothing)(model)
    changed = {name: value for name, value in replaced.items() if name not in choice.given}
    notes = [
        f"editor.{name}: the default {_in_words(getattr(choice.settings, name))} is for other models; this one has "
        f"{model.num_layers} layers of {', '.join(model.parts)}, and {_in_words(value)} is used."
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
        # An outside editor may read weights, which this model lacks; the workers check it again.
    return config, notes


def memory(config: RunConfig) -> Needed | None:
    """Memory of one worker of a fitted run, for prompts of a usual length; None for a family that cannot be inspected.

    Joint training has one edit, and reads the records of a step together.
    """
    if not can_inspect(config.backbone.family):
        return None
    model = _inspected(config.backbone, _state(config.backbone.checkpoint))
    if not _COUNTED.issubset(model.parts):  # a family from outside the package may name its parts otherwise
        return None
    picture = Picture("", np.zeros((*_SIZE, 3), dtype=np.uint8))
    cell = model.sequence(Probe(_QUESTION, _ANSWER, picture), find_template(config.data.template))
    at_once, sequences = config.pipeline.at_once, None
    edits = config.pipeline.batch_size if at_once == AUTO else min(at_once, config.pipeline.batch_size)
    if config.commit is not None and config.commit.name == "joint":
        joint = config.commit.settings
        edits, sequences = 1, joint.records * (2 + joint.negatives) + joint.kept
    return needed(
        model,
        editors.find(config.editor.name)(config.editor.settings),
        config.objective.settings,
        edits=edits,
        positions=len(cell.tokens),
        tokens=len(cell.tokens) - cell.first_target,
        sequences=sequences,
    )


def _nothing(backbone: Backbone) -> dict[str, Any]:
    return {}


def _in_words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


@lru_cache(maxsize=4)
def _inspected(backbone: BackboneConfig, state: tuple[tuple[str, int, int], ...]) -> Backbone:
    """The model without weights, cached until its files change."""
    size = backbone.image_size
    return inspect_backbone(backbone.family, backbone.checkpoint, dtype=backbone.dtype, image_size=size)


def _state(checkpoint: str) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of each file of a local checkpoint; empty for the embedded model and for hub ids."""
    folder = Path(checkpoint).expanduser()
    if checkpoint == EMBEDDED or not folder.is_dir():
        return ()
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return tuple((file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)


def editor_weights(config: RunConfig) -> dict[str, str]:
    """Hash of a trainable editor's weights, by setting; empty for other editors.

    Raises:
        InputError: The file is missing, damaged, or was trained for another model or other settings.
    """
    editor = editors.find(config.editor.name)(config.editor.settings)
    if not isinstance(editor, Trainable):
        return {}
    path = config.editor.settings.checkpoint
    model = fingerprint(config.backbone.family, config.backbone.checkpoint, dtype=config.backbone.dtype)
    load_weights(path, config.editor.name, editor.weight_settings, model)
    with locate(path, "editor.checkpoint").open() as stream:
        return {"editor.weights": hashlib.file_digest(stream, "sha256").hexdigest()[:16]}
