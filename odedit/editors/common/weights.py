"""Files of trained editor weights: MEND's hypernetwork, UniKE's encoders.

A file names the editor, settings and backbone that it was trained for, and is refused for others.
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
    """Writes the weights atomically.

    Args:
        path: File to write.
        weights: Tensors by name.
        editor: Name of the editor.
        settings: Settings that the weights depend on (sites, widths).
        fingerprint: Fingerprint of the backbone that they were trained for.
        trained_with: Objective and supervision of the training, in words.
    """
    info = {"editor": editor, "settings": dict(settings), "fingerprint": fingerprint, "trained_with": trained_with}
    write_tensors(at(path), weights, {"format": FORMAT, "info": json.dumps(info, sort_keys=True)})


def load_weights(
    path: str | None, editor: str, settings: Mapping[str, Any], fingerprint: str, device: str = "cpu"
) -> dict[str, Tensor]:
    """Reads the weights of an editor, once per process and file.

    Args:
        path: The setting `checkpoint`.
        editor: Name of the editor.
        settings: Settings that the weights depend on.
        fingerprint: Fingerprint of the backbone to edit.
        device: Device of the tensors.

    Raises:
        InputError: The path is None, or the file is missing, damaged, or trained for another editor, settings or
            backbone. The message names the command that makes the file.
    """
    hint = f"`odedit train {editor} --config F --out FILE` makes one"
    if path is None:
        raise InputError(f"editor.checkpoint: got null, but {editor} needs a file of trained weights; {hint}.")
    version = _version(path, hint)
    info, weights = _info(path, version), _tensors(path, version, device)
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
    """Raises InputError unless the weights are finite and have the expected names and shapes.

    Args:
        path: File, for the message.
        weights: Tensors of the file, by name.
        expected: Tensors with the right names and shapes, possibly without values (device `meta`).
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
    problems = "; ".join(f"{len(names)} {kind} (first: {names[0]})" for kind, names in parts.items() if names)
    if problems:
        raise InputError(
            f"editor.checkpoint {masked(str(path))!r}: its tensors are not those of the editor: {problems}. "
            "Fetch the file again, or train it anew."
        )


def trained_with(path: str) -> str:
    """Objective and supervision that a file was trained with, in words. Raises InputError as `load_weights` does."""
    return str(_info(path, _version(path, "`odedit train` makes one")).get("trained_with", ""))


_NAMES = {"editor": "editor", "settings": "setting of the editor"}


def _version(path: str, hint: str) -> tuple[int | None, int | None]:
    """Key of the file's content: modification time, and the inode in case that a file is replaced within a tick."""
    location = locate(path, "editor.checkpoint")
    try:
        info = location.info()
        if info.type != FileType.File:
            raise InputError(f"editor.checkpoint: no such file {location.text!r}; {hint}.")
        return info.mtime_ns, os.stat(location).st_ino if location.is_local else info.size
    except OSError as error:
        raise InputError(f"editor.checkpoint: cannot look at {location.text!r} ({reason(error)}).") from error


@lru_cache(maxsize=8)
def _info(path: str, version: tuple[int | None, int | None]) -> dict[str, Any]:
    """Editor, settings, fingerprint and training, from the file's metadata."""
    metadata = _read(path, read_metadata)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"editor.checkpoint {masked(path)!r}: format is {metadata.get('format')!r}, expected {FORMAT!r}."
        )
    try:
        return dict(json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"editor.checkpoint {masked(path)!r}: its metadata is damaged ({error}); fetch the file again."
        ) from error


@lru_cache(maxsize=8)
def _tensors(path: str, version: tuple[int | None, int | None], device: str) -> dict[str, Tensor]:
    return _read(path, lambda location: read_tensors(location, device)[0])


def _read(path: str, read: Callable[[Location], T]) -> T:
    location = locate(path, "editor.checkpoint")
    try:
        return read(location)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"editor.checkpoint {location.text!r} cannot be read as safetensors: {masked(str(error))}."
        ) from error
