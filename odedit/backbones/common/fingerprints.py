"""Fingerprints of models in two forms: today's covers every byte of the weights, that of earlier versions a sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LENGTH, EARLIER_LENGTH = 24, 16
_SAMPLE, _SAMPLE_EVERY = 1 << 12, 1 << 18


class Fingerprint(str):
    """A model's fingerprint, which can also be compared with those that earlier versions wrote.

    Copies and pickles of it are plain text.
    """

    _earlier: Callable[[], str]

    def __new__(cls, text: str, earlier: Callable[[], str]) -> Fingerprint:
        """Takes the earlier form as a function: it reads files."""
        made = super().__new__(cls, text)
        made._earlier = earlier
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def in_form_of(self, kept: str) -> str:
        """This model's fingerprint in the form of another one, with which it is to be compared."""
        return self._earlier() if len(kept) == EARLIER_LENGTH else str(self)


def comparable(loaded: Any, kept: Any) -> Any:
    """What `kept`, from a file, is to be compared with: `loaded`, a fingerprint in the form of the kept one."""
    return loaded.in_form_of(kept) if isinstance(loaded, Fingerprint) and isinstance(kept, str) else loaded


def mismatch(kept: str, loaded: str) -> str:
    """What it means that a kept fingerprint is not `comparable(loaded, kept)`, to follow "made"."""
    loaded = comparable(loaded, kept)
    if len(kept) == len(loaded) == EARLIER_LENGTH:
        return (
            "by an earlier odedit for another model, or with another version of transformers "
            f"(fingerprint {kept}, this model's would be {loaded})"
        )
    return f"for another model (fingerprint {kept}, this model's is {loaded})"


def earlier_fingerprint(folder: Path, settings: Mapping[str, Any], hub_id: str | None = None) -> str:
    """The fingerprint that earlier versions gave a model. For comparison with what they wrote, and nothing else.

    Args:
        settings: The whole configuration.
        hub_id: The model's, if that was how the user named it: then no weights were read.
    """
    kept = {key: value for key, value in settings.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    if hub_id is not None:
        digest.update(f"{hub_id}@None".encode())  # a commit was meant to follow, and never did
        return digest.hexdigest()[:EARLIER_LENGTH]
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for offset in range(0, size, _SAMPLE_EVERY):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:EARLIER_LENGTH]
