"""What positions that have been computed offer to those behind them: keys and values of attention, layer by layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_SPARE = 8
"""Spare positions that are allocated beyond those asked for."""


class KeyValues:
    """`(R, heads, S, head width)` keys and values by layer; takes the place of the library's cache in a forward.

    Unlike that one it holds one forward, and a further one replaces it: R sequences are computed whole, and what is
    behind a part of them is computed from that part again and again.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._extended: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keeps them, and gives them back as attention is to see them."""
        self._layers[layer] = keys, values
        self._extended.pop(layer, None)
        return keys, values

    def extended(self, layer: int, keys: Tensor, values: Tensor, kept: int = 0) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, followed by `kept` from earlier calls and the T new ones.

        The shape is `(R, heads, S + kept + T, head width)`.

        Valid until the next call.

        Args:
            kept: Number of positions from earlier calls that stay, in front of the T new ones.

        KeyError: no forward has been there.
        """
        before = self._layers[layer]
        size = before[0].shape[2] + kept
        whole = self._extended.get(layer, before)
        if whole[0].shape[2] < size + keys.shape[2]:
            # What is in front stays; copying it again would take longer than the attention.
            wholes = [part.new_empty(*part.shape[:2], size + keys.shape[2] + _SPARE, part.shape[3]) for part in before]
            for new, old in zip(wholes, whole, strict=True):
                new[:, :, :size] = old[:, :, :size]
            whole = self._extended[layer] = wholes[0], wholes[1]
        for part, behind in zip(whole, (keys, values), strict=True):
            part[:, :, size : size + behind.shape[2]] = behind
        return whole[0][:, :, : size + keys.shape[2]], whole[1][:, :, : size + keys.shape[2]]

    def branch(self) -> KeyValues:
        """A copy that shares what is there, for a forward that goes another way from here on."""
        other = KeyValues()
        other._layers = dict(self._layers)
        return other
