"""Files of tensors, as safetensors, wherever they are."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from odedit.storage.location import Location

_MAX_HEADER_BYTES = 100 * 2**20
"""What safetensors allows."""


def write_tensors(place: Location, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file; a reader sees the whole file or none. Tensors may share no memory.

    Raises:
        SafetensorError: There is no room on this machine.
        OSError: It cannot be written where it belongs.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    place.write_with(lambda path: save_file(stored, path, dict(metadata)))


def read_tensors(place: Location, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file.

    Raises:
        SafetensorError: The file is damaged.
        OSError: It cannot be read.
    """
    with place.local_copy() as path, safe_open(path, framework="pt", device=device) as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata() or {}  # noqa: SIM118


def read_metadata(place: Location) -> dict[str, str]:
    """What a file says about itself, without its tensors. Raises as `read_tensors` does."""
    if place.is_local:
        with safe_open(place, framework="pt") as stream:
            return stream.metadata() or {}
    with place.open() as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > min(stream.size(), _MAX_HEADER_BYTES):
            raise SafetensorError("the file is cut off, or no safetensors")
        try:
            return dict(json.loads(stream.read(size)).get("__metadata__") or {})
        except (ValueError, AttributeError) as error:
            raise SafetensorError(f"the header is damaged: {error}") from error
