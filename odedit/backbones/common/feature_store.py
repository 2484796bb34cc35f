"""Image features on disk or in an object store, shared by workers, runs and machines.

    <store>/<family>-<dtype>-<model>/<connected|tower>/<xx>/<picture>.safetensors

One picture is one file. Workers that compute the same picture write the same bytes under the same name, so no locks,
appends or listings are needed. `<model>` is a hash of `odedit.backbones.common.feature_cache.made_with`.

A failing store costs time and no edits: an unreadable file counts as missing, and a failed write is skipped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from odedit.errors import InputError
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, locate
from odedit.storage.retries import is_transient

FORMAT = "odedit-features-1"
_NAME_LENGTH = 32
_THREADS = 16
_PAUSE_SECONDS = 60.0

Warn = Callable[[str], None]


class FeatureStore:
    """Features of pictures by the picture's key, in folders that the caller names.

    Args:
        root: Folder of the store, created with the first feature.
        warn: Called with a message at the first failed read and at the first failed write.
    """

    def __init__(self, root: Location, warn: Warn | None = None) -> None:
        self._root = root
        self._warn = warn or logging.getLogger(__name__).warning
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._retry_at: dict[str, float] = {}

    @classmethod
    def at(
        cls, text: str, setting: str = "feature store", warn: Warn | None = None, *, must_answer: bool = True
    ) -> Self:
        """The store at a path or address, which need not exist yet.

        Args:
            must_answer: Whether a transient failure of the storage is an error.

        Raises:
            InputError: A file has this path or lies above it, or the address is of an unknown kind.
        """
        # No retries: they would make an edit wait.
        root = locate(text, setting).with_patience(0)
        try:
            # A path that does not exist yet may still have a file above it.
            above = Path(root.path).parents if root.is_local else ()
            is_file = root.is_file() or any(folder.is_file() for folder in above)
        except OSError as error:
            if not must_answer and is_transient(error):
                return cls(root, warn)
            raise InputError(f"{setting}: cannot look at {root.text!r} ({masked(str(error))}).") from None
        if is_file:
            raise InputError(f"{setting}: {root.text!r} is or lies under a file, expected a folder or none yet.")
        return cls(root, warn)

    def warn_through(self, warn: Warn) -> None:
        """Replaces the warning callback and re-arms the one-time warnings."""
        self._warn = warn
        self._warned.clear()

    def read(self, folder: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """The features that exist and are undamaged, on the CPU, in the order of the keys."""
        features = _in_threads(partial(self._read_one, folder), keys)
        return {key: feature for key, feature in features.items() if feature is not None}

    def write(self, folder: str, features: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Writes every feature to a file; a reader sees it whole or not at all, or detects the damage.

        Args:
            features: Features on the CPU, by the picture's key.
            about: Origin of the features, stored as a note for people who open a file.
        """
        note = {"format": FORMAT, **about}
        _in_threads(lambda key: self._write_one(folder, key, features[key], note), features)

    def _read_one(self, folder: str, key: str) -> Tensor | None:
        data = self._attempt("read", lambda: _read(self._file(folder, key)))
        return None if data is None else _unpacked(data, key)

    def _write_one(self, folder: str, key: str, feature: Tensor, note: Mapping[str, str]) -> None:
        data = _packed(feature, {"picture": key, **note})
        self._attempt("written", lambda: _write(self._file(folder, key), data))

    def _file(self, folder: str, key: str) -> Location:
        # A key is arbitrary text; its hash is a valid name everywhere, and spreads evenly over 256 folders.
        name = hashlib.sha256(key.encode()).hexdigest()[:_NAME_LENGTH]
        return self._root.child(f"{folder}/{name[:2]}/{name}.safetensors")

    def _attempt(self, verb: str, act: Callable[[], bytes | None]) -> bytes | None:
        """Runs `act` unless it failed within the last minute, so that an outage costs one time-out a minute."""
        if time.monotonic() < self._retry_at.get(verb, 0.0):
            return None
        try:
            return act()
        except Exception as error:  # clients of object stores raise their own types
            with self._lock:
                self._retry_at[verb] = time.monotonic() + _PAUSE_SECONDS
                is_first = verb not in self._warned
                self._warned.add(verb)
            if is_first:
                reason = masked(" ".join(f"{type(error).__name__}: {error}".split())[:300])
                self._warn(
                    f"The feature store {self._root.text!r} cannot be {verb} ({reason}). "
                    "Pictures are computed again, which costs time and nothing else."
                )
            return None


def _in_threads(act: Callable[[str], Any], keys: Iterable[str]) -> dict[str, Any]:
    """Results of `act` by key. Reading from an object store is mostly waiting, which threads overlap."""
    names = list(keys)
    if len(names) < 2:
        return {key: act(key) for key in names}
    with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
        return dict(zip(names, pool.map(act, names), strict=True))


def _read(file: Location) -> bytes | None:
    """The file's content; None if it does not exist."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _write(file: Location, data: bytes) -> None:
    file.parent.make_folder()
    file.write_bytes(data)


def _packed(feature: Tensor, note: Mapping[str, str]) -> bytes:
    feature = feature.detach().contiguous()
    checksum = zlib.crc32(feature.flatten().view(torch.uint8).numpy().tobytes())
    # One text, because safetensors orders several differently in each process.
    return save({"features": feature}, {"odedit": json.dumps({**note, "crc32": checksum}, sort_keys=True)})


def _unpacked(data: bytes, key: str) -> Tensor | None:
    """The feature in a file; None if the file is cut off, altered, or another picture's."""
    try:
        feature = load(data)["features"]
        start = 8 + int.from_bytes(data[:8], "little")
        note = json.loads(json.loads(data[8:start])["__metadata__"]["odedit"])
        is_whole = note["crc32"] == zlib.crc32(memoryview(data)[start:])
        return feature if is_whole and (note["format"], note["picture"]) == (FORMAT, key) else None
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
