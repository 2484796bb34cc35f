"""What positions that have been computed offer to those behind them: keys and values of attention, layer by layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class KeyValues:
    """`(R, heads, S, head width)` keys and values by layer; takes the place of the library's cache in a forward.

    Unlike that one it holds one forward, and a further one replaces it: R sequences are computed whole, and what is
    behind a part of them is computed from that part again and again.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keeps them, and gives them back as attention is to see them."""
        self._layers[layer] = keys, values
        return keys, values

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Those of a layer. KeyError: no forward has been there."""
        return self._layers[layer]

    def branch(self) -> KeyValues:
        """A copy that shares what is there, for a forward that goes another way from here on."""
        other = KeyValues()
        other._layers = dict(self._layers)
        return other
