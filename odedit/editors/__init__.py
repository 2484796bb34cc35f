"""Editors, one file each, found by file name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from odedit import plugins
from odedit.editors.base import Editor, Mergeable, OptimizerSettings, Trace
from odedit.errors import InputError, unknown_name

__all__ = ["Editor", "Mergeable", "OptimizerSettings", "Trace", "find", "load_editor", "names"]


def names() -> tuple[str, ...]:
    """Names of the editors in this folder."""
    return plugins.names(sys.modules[__name__])


def find(name: str) -> Any:
    """The class of an editor. Raises InputError for an unknown name."""
    return plugins.find(sys.modules[__name__], "editor", name, "EDITOR")


def load_editor(name: str, settings: Mapping[str, Any] | None = None) -> Editor:
    """Builds an editor from its name and the settings that differ from the defaults.

    Raises:
        InputError: Unknown editor or setting, or a value that is not allowed.
    """
    editor_class = find(name)
    fields = editor_class.Config.__dataclass_fields__
    for key in settings or {}:
        if key not in fields:
            raise unknown_name(f"setting of editor {name!r}", key, fields)
    try:
        config = editor_class.Config(**(settings or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"editor.{error}") from error
    editor: Editor = editor_class(config)
    return editor
