"""Weights that an editor learns before it edits, as a file: MEND's hypernetwork, UniKE's encoders.

The file says which editor, settings and backbone it was trained for, and is refused for any other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from pyarrow.fs import FileType
from safetensors import SafetensorError
from torch import Tensor

from odedit.backbones.common.fingerprints import comparable, mismatch
from odedit.errors import InputError
from odedit.runtime.addresses import masked, reason
from odedit.storage.location import Location, Place, at, locate
from odedit.storage.tensors import read_metadata, read_tensors, write_tensors

FORMAT = "odedit-editor-1"

T = TypeVar("T")


def save_weights(
    path: Place,
    weights: Mapping[str, Tensor],
    editor: str,
    settings: Mapping[str, Any],
    fingerprint: str,
    trained_with: str = "",
) -> None:
    """Writes the weights; a reader sees the whole file or none.

    Args:
        editor: Its name.
        settings: The editor's settings that the weights depend on (sites, widths).
        fingerprint: Of the backbone they were trained for.
        trained_with: Objective and supervision of the training, in words.
    """
    about = {"editor": editor, "settings": dict(settings), "fingerprint": fingerprint, "trained_with": trained_with}
    info = json.dumps(about, sort_keys=True)
    metadata = {"format": FORMAT, "info": info}
    write_tensors(at(path), weights, metadata)


def load_weights(
    path: str | None, editor: str, settings: Mapping[str, Any], fingerprint: str, device: str = "cpu"
) -> dict[str, Tensor]:
    """Reads the weights of an editor; read once per process and file.

    Raises:
        InputError: None given, missing, damaged, or trained for another editor, settings or backbone. The message
            names the command that makes them.
    """
    hint = f"`odedit train {editor} --config F --out FILE` makes one"
    if path is None:
        raise InputError(f"editor.checkpoint: {editor} learns before it edits and needs its weights; {hint}.")
    version = _version(path, hint)
    info, weights = _about(path, version), _tensors(path, version, device)
    wanted = {"editor": editor, "settings": json.loads(json.dumps(dict(settings))), "fingerprint": fingerprint}
    for name, value in wanted.items():
        got = info.get(name)
        if got == comparable(value, got):
            continue
        if name == "fingerprint":
            raise InputError(
                f"editor.checkpoint {masked(path)!r} was trained {mismatch(str(got), fingerprint)}; {hint} for it."
            )
        raise InputError(
            f"editor.checkpoint {masked(path)!r} was trained for another {_NAMES[name]}: {got!r}, "
            f"this run has {value!r}; {hint} for it."
        )
    return weights


def check_tensors(path: str | None, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises InputError unless a file's weights are finite and those that the editor needs for the model.

    Args:
        path: The file, for the error.
        expected: Tensors of the names and shapes that are right; their values are not read.
    """
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in weights
        if name in expected and weights[name].shape != expected[name].shape
    ]
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    parts = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": shapes,
        "with NaN or infinite values": broken,
    }
    problems = "; ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in parts.items() if names)
    if problems:
        raise InputError(
            f"editor.checkpoint {masked(str(path))!r}: its tensors are not those of the editor: {problems}. "
            "Fetch the file again, or train it anew."
        )


def trained_with(path: str) -> str:
    """Objective and supervision that a file of weights was trained with. Raises InputError as `load_weights` does."""
    return str(_about(path, _version(path, "`odedit train` makes one")).get("trained_with", ""))


_NAMES = {"editor": "editor", "settings": "setting of the editor"}


def _version(path: str, hint: str) -> tuple[int | None, int | None]:
    """Tells a file from the one that has replaced it, also within a tick of this machine's clock."""
    place = locate(path, "editor.checkpoint")
    try:
        found = place.info()
        if found.type != FileType.File:
            raise InputError(f"editor.checkpoint: no such file {place.text!r}; {hint}.")
        return found.mtime_ns, os.stat(place).st_ino if place.is_local else found.size
    except OSError as error:
        raise InputError(f"editor.checkpoint: cannot look at {place.text!r} ({reason(error)}).") from error


@lru_cache(maxsize=8)
def _about(path: str, version: tuple[int | None, int | None]) -> dict[str, Any]:
    """What the file says about itself, without its tensors."""
    metadata = _read(path, read_metadata)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"editor.checkpoint {masked(path)!r}: format is {metadata.get('format')!r}, expected {FORMAT!r}."
        )
    try:
        return dict(json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"editor.checkpoint {masked(path)!r}: what it says about itself is damaged ({error})."
        ) from error


@lru_cache(maxsize=8)
def _tensors(path: str, version: tuple[int | None, int | None], device: str) -> dict[str, Tensor]:
    return _read(path, lambda place: read_tensors(place, device)[0])


def _read(path: str, read: Callable[[Location], T]) -> T:
    place = locate(path, "editor.checkpoint")
    try:
        return read(place)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"editor.checkpoint {place.text!r} cannot be read as safetensors: {masked(str(error))}."
        ) from error
