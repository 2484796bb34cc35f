"""A KV cache: keys and values of attention by layer, for positions that are computed later."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_SPARE = 8
"""Positions allocated beyond those asked for."""


class KVCache:
    """Keys and values `(R, heads, S, head width)` by layer, passed to a forward as the library's cache is.

    Unlike the library's cache it holds exactly one forward of R whole sequences: a further forward replaces it, and
    continuations of a part of the sequences are computed from that part again and again.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._extended: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores a layer's keys and values, and returns them for attention."""
        self._layers[layer] = keys, values
        self._extended.pop(layer, None)
        return keys, values

    def extended(self, layer: int, keys: Tensor, values: Tensor, kept: int = 0) -> tuple[Tensor, Tensor]:
        """A layer's keys and values followed by T new ones, `(R, heads, S + kept + T, head width)`.

        The result is a view that the next call overwrites.

        Args:
            kept: Number of positions from earlier calls to keep between the S cached and the T new ones. Positions
                after the new ones keep their content for later calls.

        Raises:
            KeyError: No forward has filled the layer.
        """
        before = self._layers[layer]
        size = before[0].shape[2] + kept
        whole = self._extended.get(layer, before)
        if whole[0].shape[2] < size + keys.shape[2]:
            # One buffer with room for the continuations: copying S positions in every call would cost more than the
            # attention.
            wholes = [part.new_empty(*part.shape[:2], size + keys.shape[2] + _SPARE, part.shape[3]) for part in before]
            for new, old in zip(wholes, whole, strict=True):
                # Positions after these may be read again, after calls that continue fewer.
                new[:, :, : old.shape[2]] = old
            whole = self._extended[layer] = wholes[0], wholes[1]
        for part, added in zip(whole, (keys, values), strict=True):
            part[:, :, size : size + added.shape[2]] = added
        return whole[0][:, :, : size + keys.shape[2]], whole[1][:, :, : size + keys.shape[2]]

    def branch(self) -> KVCache:
        """A copy that shares the stored tensors; a forward into the copy leaves the original as it is."""
        other = KVCache()
        other._layers = dict(self._layers)
        return other
