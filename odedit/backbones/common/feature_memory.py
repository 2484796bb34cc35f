"""A backbone that remembers the image features it has computed, in memory and, if it is given one, in a store."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL
import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.backbones.common.feature_store import FeatureStore
from odedit.data import decoding, rewording
from odedit.inputs.batch import Picture
from odedit.runtime.lru import Recent

MEMORY_BYTES = 256 * 2**20
"""Of the model's own memory: some 1,600 pictures of BLIP-2-2.7B in half precision, 57 of LLaVA-1.5-7B."""


def remembering(backbone: Backbone, store: FeatureStore | None = None, memory_bytes: int = MEMORY_BYTES) -> Backbone:
    """The backbone, whose `image_features` computes no picture that it, or with a store anyone, has computed before.

    On a GPU a picture may differ in its last bits from itself in another batch; it is then remembered as it was
    computed first.

    Args:
        store: Shared with other processes.
        memory_bytes: How much is remembered on the backbone's device.
    """
    return cast(Backbone, _Remembering(backbone, store, memory_bytes))


class _Remembering:
    """In everything but `image_features` the backbone itself."""

    def __init__(self, backbone: Backbone, store: FeatureStore | None, memory_bytes: int) -> None:
        self._backbone, self._store = backbone, store
        self._recent: Recent[Tensor] = Recent(memory_bytes)
        self._about = made_with(backbone) if store is not None else {}

    @property
    def store(self) -> FeatureStore | None:
        return self._store

    def __getattr__(self, name: str) -> Any:
        if name == "_backbone":  # not there yet: while a copy is made
            raise AttributeError(name)
        return getattr(self._backbone, name)

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture], before_connector: bool = False) -> Mapping[str, Tensor]:
        distinct = {picture.key: picture for picture in pictures}
        found: dict[str, Tensor] = {}
        for key in distinct:
            feature = self._recent.get((key, before_connector))
            if feature is not None:
                found[key] = feature
        missing = [key for key in distinct if key not in found]
        added = {}
        if missing and self._store is not None:
            added = self._on_device(self._store.read(self._folder(before_connector), missing))
        new = [distinct[key] for key in missing if key not in added]
        if new:
            computed = self._backbone.image_features(new, before_connector)
            if self._store is not None:
                host = torch.stack(list(computed.values())).cpu()  # at once: every transfer waits for the device
                folder = self._folder(before_connector)
                self._store.write(folder, dict(zip(computed, host, strict=True)), self._about)
            # Copies: a view would keep its whole batch alive.
            added |= {key: feature.clone() for key, feature in computed.items()}
        for key, feature in added.items():
            self._recent.put((key, before_connector), feature, feature.nbytes)
        found |= added
        return {key: found[key] for key in distinct}

    def _on_device(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not features:
            return {}
        at_once = torch.stack(list(features.values())).to(_a_weight(self._backbone).device)
        return {key: feature.clone() for key, feature in zip(features, at_once, strict=True)}

    def _folder(self, before_connector: bool) -> str:
        digest = hashlib.sha256("\n".join(f"{name}={self._about[name]}" for name in sorted(self._about)).encode())
        model = f"{self._about['family']}-{self._about['dtype']}-{digest.hexdigest()[:16]}"
        return f"{model}/{'tower' if before_connector else 'connected'}"


def made_with(backbone: Backbone) -> dict[str, str]:
    """Everything that features depend on besides the picture and the side of the connector.

    A file's key stands for what is in the file, so the code that decodes, alters and processes pictures belongs here,
    and so do the libraries: what another version computes is other features, in the last bits at least.
    """
    import transformers

    weight = _a_weight(backbone)
    return {
        "family": backbone.family,
        "weights": backbone.fingerprint,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "processor": _processing(backbone),
        "code": _code(backbone),
        **{library.__name__: library.__version__ for library in (torch, transformers, np, PIL)},
    }


def _a_weight(backbone: Backbone) -> Tensor:
    return backbone.site("layers.0.ffn.in").weight


def _processing(backbone: Backbone) -> str:
    """What the processor makes of one picture tells its settings apart, wherever they come from.

    The picture is wider than high and larger than most models take, so size, cut, filter, mean and deviation all show.
    """
    values = np.arange(360 * 500 * 3, dtype=np.int64)
    pixels = (values * values // 7 % 251).astype(np.uint8).reshape(360, 500, 3)
    processed = backbone.processor.process(Picture("processing", pixels)).pixels
    return hashlib.sha256(f"{processed.shape}".encode() + processed.tobytes()).hexdigest()[:16]


def _code(backbone: Backbone) -> str:
    """A hash of the files that stand between a picture's bytes and its features."""
    classes = (*type(backbone).__mro__, *type(backbone.processor).__mro__)
    names = {kind.__module__ for kind in classes} - {"builtins", "abc", "typing"}
    modules = [decoding, rewording, *(sys.modules[name] for name in sorted(names))]
    files = [module.__file__ for module in modules if getattr(module, "__file__", None)]
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()[:16]
