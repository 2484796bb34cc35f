"""Reading and writing of safetensors files, local or at an address."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from odedit.storage.location import Location

_MAX_HEADER_BYTES = 100 * 2**20
"""Limit of the safetensors format."""


def write_tensors(location: Location, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file atomically. Tensors must not share memory.

    Raises:
        SafetensorError: The local disk is full.
        OSError: The location cannot be written.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    location.write_with(lambda path: save_file(stored, path, dict(metadata)))


def read_tensors(location: Location, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        SafetensorError: The file is damaged.
        OSError: The file cannot be read.
    """
    with location.local_copy() as path, safe_open(path, framework="pt", device=device) as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata() or {}  # noqa: SIM118


def read_metadata(location: Location) -> dict[str, str]:
    """Metadata of a file, without reading its tensors. Raises as `read_tensors` does."""
    if location.is_local:
        with safe_open(location, framework="pt") as stream:
            return stream.metadata() or {}
    with location.open() as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > min(stream.size(), _MAX_HEADER_BYTES):
            raise SafetensorError("the file is cut off, or no safetensors")
        try:
            return dict(json.loads(stream.read(size)).get("__metadata__") or {})
        except (ValueError, AttributeError) as error:
            raise SafetensorError(f"the header is damaged: {error}") from error
