"""Weights that an editor learns before it edits, as a file: MEND's hypernetwork, UniKE's encoders.

The file says which editor, settings and backbone it was trained for, and is refused for any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from odedit.errors import InputError
from odedit.files import write_atomically

FORMAT = "odedit-editor-1"


def save_weights(
    path: Path,
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
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {"format": FORMAT, "info": info}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


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
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"editor.checkpoint: no such file {path!r}; {hint}.")
    version = _version(file)
    info, weights = _about(str(file), version), _tensors(str(file), version, device)
    wanted = {"editor": editor, "settings": json.loads(json.dumps(dict(settings))), "fingerprint": fingerprint}
    for name, value in wanted.items():
        if info.get(name) != value:
            raise InputError(
                f"editor.checkpoint {path!r} was trained for another {_NAMES[name]}: {info.get(name)!r}, "
                f"this run has {value!r}; {hint} for it."
            )
    return weights


def trained_with(path: str) -> str:
    """Objective and supervision that a file of weights was trained with. Raises InputError as `load_weights` does."""
    file = Path(path).expanduser()
    return str(_about(str(file), _version(file)).get("trained_with", ""))


_NAMES = {"editor": "editor", "settings": "setting of the editor", "fingerprint": "model (fingerprint of its weights)"}


def _version(file: Path) -> tuple[int, int]:
    """Tells a file from the one that has replaced it, also within a tick of the file system's clock."""
    found = file.stat()
    return found.st_mtime_ns, found.st_ino


@lru_cache(maxsize=8)
def _about(path: str, version: tuple[int, int]) -> dict[str, Any]:
    """What the file says about itself, without its tensors."""
    with _opened(path, "cpu") as stream:
        metadata = stream.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise InputError(f"editor.checkpoint {path!r}: format is {metadata.get('format')!r}, expected {FORMAT!r}.")
    try:
        return dict(json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"editor.checkpoint {path!r}: what it says about itself is damaged ({error}).") from error


@lru_cache(maxsize=8)
def _tensors(path: str, version: tuple[int, int], device: str) -> dict[str, Tensor]:
    with _opened(path, device) as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: str, device: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        raise InputError(f"editor.checkpoint {path!r} cannot be read as safetensors: {error}.") from error
