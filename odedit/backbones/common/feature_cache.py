"""A cache of image features on the backbone's device, optionally backed by a `FeatureStore`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import PIL
import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.backbones.common.feature_store import FeatureStore
from odedit.data import decoding, rewording
from odedit.inputs.batch import Picture
from odedit.runtime.lru import LRU

CACHE_BYTES = 256 * 2**20
"""Size of the cache: about 1,600 pictures of BLIP-2-2.7B in half precision, 57 of LLaVA-1.5-7B."""


@runtime_checkable
class RemembersSizes(Protocol):
    """A backbone whose prompts depend on the sizes of pictures."""

    def note_sizes(self, pictures: Sequence[Picture]) -> None: ...


def with_feature_cache(
    backbone: Backbone, store: FeatureStore | None = None, cache_bytes: int = CACHE_BYTES
) -> Backbone:
    """A backbone whose `image_features` looks up pictures before it computes them.

    On a GPU the last bits of a picture's features depend on its batch; the first computed features are kept.

    Args:
        store: Store that is shared with other processes.
        cache_bytes: Size of the cache on the backbone's device.
    """
    return cast(Backbone, _Cached(backbone, store, cache_bytes))


class _Cached:
    """A proxy of the backbone with its own `image_features`."""

    def __init__(self, backbone: Backbone, store: FeatureStore | None, cache_bytes: int) -> None:
        self._backbone, self._store = backbone, store
        self._cache: LRU[Tensor] = LRU(cache_bytes)
        self._about = made_with(backbone) if store is not None else {}

    @property
    def store(self) -> FeatureStore | None:
        return self._store

    def __getattr__(self, name: str) -> Any:
        if name == "_backbone":  # unset while the proxy is copied
            raise AttributeError(name)
        return getattr(self._backbone, name)

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture], before_connector: bool = False) -> Mapping[str, Tensor]:
        distinct = {picture.key: picture for picture in pictures}
        if isinstance(self._backbone, RemembersSizes):
            self._backbone.note_sizes(list(distinct.values()))
        features: dict[str, Tensor] = {}
        for key in distinct:
            feature = self._cache.get((key, before_connector))
            if feature is not None:
                features[key] = feature
        missing = [key for key in distinct if key not in features]
        added = {}
        if missing and self._store is not None:
            added = self._on_device(self._store.read(self._folder(before_connector), missing))
        new = [distinct[key] for key in missing if key not in added]
        if new:
            computed = self._backbone.image_features(new, before_connector)
            if self._store is not None:
                folder = self._folder(before_connector)
                self._store.write(folder, _moved(computed, torch.device("cpu")), self._about)
            # Copies, because a view keeps its whole batch alive.
            added |= {key: feature.clone() for key, feature in computed.items()}
        for key, feature in added.items():
            self._cache.put((key, before_connector), feature, feature.nbytes)
        features |= added
        return {key: features[key] for key in distinct}

    def _on_device(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not features:
            return {}
        moved = _moved(features, _any_weight(self._backbone).device)
        return {key: feature.clone() for key, feature in moved.items()}

    def _folder(self, before_connector: bool) -> str:
        digest = hashlib.sha256("\n".join(f"{name}={self._about[name]}" for name in sorted(self._about)).encode())
        model = f"{self._about['family']}-{self._about['dtype']}-{digest.hexdigest()[:16]}"
        return f"{model}/{'tower' if before_connector else 'connected'}"


def _moved(features: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Features on another device, in one transfer if they have one shape, as each transfer waits for the device."""
    if len({feature.shape for feature in features.values()}) > 1:
        return {key: feature.to(device) for key, feature in features.items()}
    return dict(zip(features, torch.stack(list(features.values())).to(device), strict=True))


def made_with(backbone: Backbone) -> dict[str, str]:
    """Everything that features depend on besides the picture's file and the side of the connector.

    Includes the code that decodes, alters and processes pictures, and the versions of libraries: another version may
    compute other features, at least in the last bits.
    """
    import transformers

    weight = _any_weight(backbone)
    return {
        "family": backbone.family,
        "weights": backbone.fingerprint,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "processor": _processing(backbone),
        "code": _code(backbone),
        **{library.__name__: library.__version__ for library in (torch, transformers, np, PIL)},
    }


def _any_weight(backbone: Backbone) -> Tensor:
    return backbone.site("layers.0.ffn.out").weight


def _processing(backbone: Backbone) -> str:
    """Hash of one processed picture, as a fingerprint of the processor's settings.

    The picture is wider than high and larger than most models' input, so that size, crop, filter, mean and standard
    deviation all change the result.
    """
    values = np.arange(360 * 500 * 3, dtype=np.int64)
    pixels = (values * values // 7 % 251).astype(np.uint8).reshape(360, 500, 3)
    processed = backbone.processor.process(Picture("processing", pixels)).pixels
    return hashlib.sha256(f"{processed.shape}".encode() + processed.tobytes()).hexdigest()[:16]


def _code(backbone: Backbone) -> str:
    """Hash of the source files that turn a picture's bytes into features."""
    classes = (*type(backbone).__mro__, *type(backbone.processor).__mro__)
    names = {kind.__module__ for kind in classes} - {"builtins", "abc", "typing"}
    modules = [decoding, rewording, *(sys.modules[name] for name in sorted(names))]
    files = [module.__file__ for module in modules if getattr(module, "__file__", None)]
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()[:16]
