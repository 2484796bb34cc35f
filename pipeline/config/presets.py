"""Presets: checkpoint, family, dtype and editors' settings by model, in `presets.yaml` beside this file.

A preset stands below the user's own settings, and above the defaults. It sets the section `backbone`, and of `editor`
what belongs to the named editor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from odedit.errors import InputError, unknown_name

_FILE = Path(__file__).parent / "presets.yaml"


@dataclass(frozen=True)
class Preset:
    """Settings for one model.

    Attributes:
        origin: Whether the editors' settings are `published` for the model or `derived` from another model's.
        source: Publication, or the model that they are derived from.
        layers: Layers of the text model.
        backbone: Settings of the section `backbone`; without a checkpoint where none is published in one piece.
        editors: Settings by editor; the others have their defaults, which are fitted to the model.
    """

    name: str
    origin: Literal["published", "derived"]
    source: str
    layers: int
    backbone: Mapping[str, Any]
    editors: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        return f"preset {self.name} ({self.origin}: {self.source})"


@cache
def _presets() -> Mapping[str, Preset]:
    read = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return {name: Preset(name=name, **values) for name, values in read.items()}


def names() -> tuple[str, ...]:
    """Names of all presets, in the order of the file."""
    return tuple(_presets())


def find(name: str) -> Preset:
    """The preset of a name. Raises InputError for an unknown one."""
    try:
        return _presets()[name]
    except KeyError:
        raise InputError(f"preset: {unknown_name('preset', name, names())}") from None


def completed(values: Mapping[str, Any], default_editor: str) -> Mapping[str, Any]:
    """A run's values with those of the preset that they name, where they give none.

    Args:
        default_editor: Editor of a run that names none.

    Raises:
        InputError: The preset is unknown, or leaves the checkpoint open and the values do as well.
    """
    name = values.get("preset")
    if name is None:
        return values
    preset = find(str(name))
    sections = dict(values)
    backbone, editor = (sections.get(key) or {} for key in ("backbone", "editor"))
    if isinstance(backbone, Mapping):
        if "checkpoint" not in {**preset.backbone, **backbone}:
            raise InputError(
                f"preset {preset.name!r} has no checkpoint, since none is published in one piece: make one with "
                f"`odedit convert {preset.name}`, and set backbone.checkpoint to its folder."
            )
        sections["backbone"] = {**preset.backbone, **backbone}
    if isinstance(editor, Mapping):
        own = preset.editors.get(str(editor.get("name", default_editor)), {})
        if own:
            sections["editor"] = {**own, **editor}
    return sections
