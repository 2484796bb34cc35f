"""Fingerprints of models in two forms: the current one covers every byte of the weights, the earlier one a sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LENGTH, EARLIER_LENGTH = 24, 16
_SAMPLE, _SAMPLE_EVERY = 1 << 12, 1 << 18


class Fingerprint(str):
    """A model's fingerprint that can also be compared with fingerprints of earlier versions.

    Copies and pickles are plain text.
    """

    _earlier: Callable[[], str]

    def __new__(cls, text: str, earlier: Callable[[], str]) -> Fingerprint:
        """Takes the earlier form as a function, because it reads files."""
        value = super().__new__(cls, text)
        value._earlier = earlier
        return value

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def in_form_of(self, kept: str) -> str:
        """This model's fingerprint in the form of a stored one."""
        return self._earlier() if len(kept) == EARLIER_LENGTH else str(self)


def comparable(loaded: Any, kept: Any) -> Any:
    """`loaded` in the form of `kept`, a value from a file, if it is a fingerprint; else unchanged."""
    return loaded.in_form_of(kept) if isinstance(loaded, Fingerprint) and isinstance(kept, str) else loaded


def mismatch(kept: str, loaded: str) -> str:
    """Message that a stored fingerprint differs from `comparable(loaded, kept)`, to follow the word "made"."""
    loaded = comparable(loaded, kept)
    if len(kept) == len(loaded) == EARLIER_LENGTH:
        return (
            "by an earlier odedit for another model, or with another version of transformers "
            f"(fingerprint {kept}, this model's would be {loaded})"
        )
    return f"for another model (fingerprint {kept}, this model's is {loaded})"


def earlier_fingerprint(folder: Path, settings: Mapping[str, Any], hub_id: str | None = None) -> str:
    """The fingerprint of earlier versions, only for comparison with files that they wrote.

    Args:
        settings: The whole configuration.
        hub_id: Hub id, if the user named the model by one; earlier versions then read no weights.
    """
    kept = {key: value for key, value in settings.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    if hub_id is not None:
        digest.update(f"{hub_id}@None".encode())  # earlier versions intended a commit here, but always wrote None
        return digest.hexdigest()[:EARLIER_LENGTH]
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for offset in range(0, size, _SAMPLE_EVERY):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:EARLIER_LENGTH]
