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

    Args:
        room: Positions that continuations may have. Keys and values are stored with room for them; longer ones are
            possible and copy the cache.
    """

    def __init__(self, room: int = 0) -> None:
        self._room = room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._extended: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores a layer's keys and values, and returns them for attention."""
        self._extended.pop(layer, None)
        if self._room:
            wholes = [_with_room(part, part.shape[2] + self._room) for part in (keys, values)]
            self._extended[layer] = wholes[0], wholes[1]
            keys, values = (whole[:, :, : keys.shape[2]] for whole in wholes)
        self._layers[layer] = keys, values
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
            # attention. Positions beyond `size` may be read again, after calls that continue fewer.
            wholes = [_with_room(part, size + keys.shape[2] + _SPARE) for part in whole]
            whole = self._extended[layer] = wholes[0], wholes[1]
        for part, added in zip(whole, (keys, values), strict=True):
            part[:, :, size : size + added.shape[2]] = added
        return whole[0][:, :, : size + keys.shape[2]], whole[1][:, :, : size + keys.shape[2]]

    def branch(self) -> KVCache:
        """A copy that shares the stored tensors; a forward into the copy leaves the original as it is.

        The room is shared too: continuations of one of them end before those of another begin.
        """
        other = KVCache(self._room)
        other._layers, other._extended = dict(self._layers), dict(self._extended)
        return other


def _with_room(part: Tensor, size: int) -> Tensor:
    """A copy `(R, heads, size, head width)`, undefined beyond the positions of `part`."""
    whole = part.new_empty(*part.shape[:2], size, part.shape[3])
    whole[:, :, : part.shape[2]] = part
    return whole
