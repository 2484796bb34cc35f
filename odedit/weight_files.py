"""Weight files of a checkpoint: which there are, what their headers say, and what one pass over every byte shows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from odedit.errors import InputError
from odedit.hub import INDEX, shards_of

WEIGHTS = "model.safetensors"
_BLOCK = 2**22
_THREADS = 8
# Unsigned type of the same width, the bits of the exponent, how far they stand to the left, and what is added to them.
_FLOATS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000, 52, 1023),
    "F32": (np.uint32, 0x7F80_0000, 23, 127),
    "F16": (np.uint16, 0x7C00, 10, 15),
    "BF16": (np.uint16, 0x7F80, 7, 127),
}
FLOATS = frozenset(_FLOATS)
"""Types of weights as safetensors names them; others are quantised weights or positions."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file.

    Attributes:
        dtype: Type in the words of safetensors, such as `BF16`.
        start, stop: Place of its bytes in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Content:
    """What the bytes of a tensor show.

    Attributes:
        digest: A hash of them.
        finite: Whether no value is NaN or infinite.
        exponent: The largest value is below 2 to the power of one more than this; 0 for a type that is no float.
    """

    digest: bytes
    finite: bool
    exponent: int


def find(folder: Path) -> list[Path]:
    """The weight files of a checkpoint's folder, those that the library reads.

    Raises:
        InputError: There are none in safetensors, a shard is missing, or the index cannot be read.
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
    """Every tensor by its name, without its values.

    Raises:
        InputError: A file is damaged or cut off.
    """
    return {name: tensor for path in files for name, tensor in _header(path)}


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="np"):
            pass  # checks that header and length of the file agree
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
    """What every tensor's bytes show; read once per process and state of the files.

    Raises:
        InputError: A file is damaged or cannot be read.
    """
    try:
        states = tuple((path, (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for path in files)
        return _contents(states)
    except OSError as error:
        raise InputError(f"backbone.checkpoint: a weight file cannot be read: {error}.") from error


@lru_cache(maxsize=8)
def _contents(states: tuple[tuple[Path, int, int, int], ...]) -> Mapping[str, Content]:
    headers = read_headers([path for path, *_ in states])
    streams = {path: os.open(path, os.O_RDONLY) for path, *_ in states}
    try:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            blocks = {
                name: [
                    pool.submit(_block, streams[one.path], start, min(_BLOCK, one.stop - start), one.dtype)
                    for start in range(one.start, one.stop, _BLOCK)
                ]
                for name, one in headers.items()
            }
            return {name: _joined([block.result() for block in parts]) for name, parts in blocks.items()}
    finally:
        for stream in streams.values():
            os.close(stream)


def _block(stream: int, start: int, size: int, dtype: str) -> Content:
    data = os.pread(stream, size, start)
    if len(data) < size:
        raise OSError("it became shorter while it was read")
    digest = hashlib.sha256(data).digest()
    if dtype not in _FLOATS:
        return Content(digest, True, 0)
    unsigned, mask, shift, bias = _FLOATS[dtype]
    largest = int((np.frombuffer(data, unsigned) & unsigned(mask)).max())
    return Content(digest, largest != mask, (largest >> shift) - bias)


def _joined(blocks: Sequence[Content]) -> Content:
    digest = hashlib.sha256(b"".join(block.digest for block in blocks)).digest()
    return Content(digest, all(block.finite for block in blocks), max((block.exponent for block in blocks), default=0))
