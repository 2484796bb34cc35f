"""Weight files of a checkpoint: their list, their headers, and a hash and the largest value of every tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from odedit.backbones.common.hub import INDEX, WEIGHTS, shards_of
from odedit.errors import InputError
from odedit.storage import disk_cache

FORMAT = "odedit-contents-1"
FileState: TypeAlias = tuple[str, int, int, int, int]
"""Path, size, modification time, status change time, and inode."""
_DIGITS = 64
_BLOCK = 2**22
_THREADS = 8
# Unsigned type of the same width, and a mask of all bits but the sign.
_FLOATS = {
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF),
    "F32": (np.uint32, 0x7FFF_FFFF),
    "F16": (np.uint16, 0x7FFF),
    "BF16": (np.uint16, 0x7FFF),
}
FLOATS = frozenset(_FLOATS)
"""Types of plain weights in the notation of safetensors; others are quantised weights or position tables."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file.

    Attributes:
        path: File of the tensor.
        dtype: Type in the notation of safetensors, such as `BF16`.
        start, stop: Byte range in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Content:
    """Hash and range of a tensor.

    Attributes:
        digest: Hexadecimal SHA-256 of the SHA-256 digests of its blocks.
        largest: Largest magnitude; infinity for NaN, 0 for a type that is not a float.
    """

    digest: str
    largest: float


def find(folder: Path) -> list[Path]:
    """The weight files in a checkpoint's folder that the library reads.

    Raises:
        InputError: The folder holds no safetensors or an adapter, a shard is missing, or the index cannot be read.
    """
    name = f"backbone.checkpoint {str(folder)!r}"
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{name} is an adapter (it holds adapter_config.json). Merge it into its model first, such as with "
            "merge_and_unload of peft, and give the folder of the merged model."
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InputError(
            f"{name} holds neither {WEIGHTS} nor {INDEX}. Other files of weights are not read, and pickled ones such "
            "as pytorch_model.bin can run code: load the model with transformers where you trust it, and save it with "
            "save_pretrained."
        )
    shards = shards_of(folder)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise InputError(
            f"{name}: {INDEX} names {len(shards)} weight files, and {len(missing)} of them cannot be found"
            + (f" (first: {missing[0]})" if missing else "")
            + ". Fetch the checkpoint again."
        )
    return [folder / shard for shard in shards]


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Tensors by name, without their values.

    Raises:
        InputError: A file is damaged or cut off.
    """
    return {name: tensor for path in files for name, tensor in _header(path)}


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="np"):
            pass  # checks that the file is as long as its header says
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"backbone.checkpoint: the weight file {str(path)!r} cannot be read as safetensors ({error}): it is "
            "damaged or cut off. Fetch it again."
        ) from error
    for name, entry in entries.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            yield name, StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start, stop)


def read_contents(files: Sequence[Path]) -> Mapping[str, Content]:
    """Hash and range of every tensor by name; computed once per machine and state of the files.

    Raises:
        InputError: A file is damaged or cannot be read.
    """
    try:
        return _contents(tuple(_state(path) for path in files))
    except OSError as error:
        raise InputError(f"backbone.checkpoint: a weight file cannot be read: {error}.") from error


def _state(path: Path) -> FileState:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@lru_cache(maxsize=8)
def _contents(states: tuple[FileState, ...]) -> Mapping[str, Content]:
    headers = read_headers([Path(path) for path, *_ in states])
    notes = disk_cache.once([FORMAT, *states], lambda kept: _from_notes(kept, headers), lambda: _to_notes(headers))
    return _from_notes(notes, headers)


def _to_notes(headers: Mapping[str, StoredTensor]) -> dict[str, list[Any]]:
    return {name: [content.digest, content.largest] for name, content in _hashed(headers).items()}


def _from_notes(notes: Any, headers: Mapping[str, StoredTensor]) -> dict[str, Content]:
    """Raises ValueError, TypeError or AttributeError unless the notes are of these tensors."""
    contents = {name: Content(str(digest), float(largest)) for name, (digest, largest) in notes.items()}
    if contents.keys() != headers.keys() or any(len(content.digest) != _DIGITS for content in contents.values()):
        raise ValueError("notes of other tensors")
    return contents


def _hashed(headers: Mapping[str, StoredTensor]) -> dict[str, Content]:
    streams = {path: os.open(path, os.O_RDONLY) for path in {tensor.path for tensor in headers.values()}}
    try:
        with ThreadPoolExecutor(min(_THREADS, torch.get_num_threads())) as pool:
            blocks = {
                name: [
                    pool.submit(_block, streams[tensor.path], start, min(_BLOCK, tensor.stop - start), tensor.dtype)
                    for start in range(tensor.start, tensor.stop, _BLOCK)
                ]
                for name, tensor in headers.items()
            }
            return {name: _joined([block.result() for block in parts]) for name, parts in blocks.items()}
    finally:
        for stream in streams.values():
            os.close(stream)


def _block(stream: int, start: int, size: int, dtype: str) -> tuple[bytes, float]:
    """Digest and largest magnitude of a block of bytes."""
    data = os.pread(stream, size, start)
    if len(data) < size:
        raise OSError("the file became shorter while it was read")
    digest = hashlib.sha256(data).digest()
    if dtype not in _FLOATS:
        return digest, 0.0
    unsigned, mask = _FLOATS[dtype]
    # As unsigned integers, magnitudes of floats keep their order; infinity and then NaN are the largest.
    largest = (np.frombuffer(data, unsigned) & unsigned(mask)).max()
    if dtype == "BF16":
        value = float((np.uint32(largest) << np.uint32(16)).view(np.float32))
    else:
        value = float(largest.view(f"f{largest.itemsize}"))
    return digest, value if math.isfinite(value) else math.inf


def _joined(blocks: Sequence[tuple[bytes, float]]) -> Content:
    digest = hashlib.sha256(b"".join(digest for digest, _ in blocks)).hexdigest()
    return Content(digest, max((largest for _, largest in blocks), default=0.0))
