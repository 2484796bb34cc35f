"""What positions that have been computed offer to those behind them: keys and values of attention, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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

    def extended(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer with T others behind them, `(R, heads, S + T, head width)`.

        Valid until the next call. That one may give the last of the T alone; those in front of them stay.

        KeyError: no forward has been there.
        """
        if layer not in self._extended:
            before_keys, before_values = self._layers[layer]
            self._extended[layer] = torch.cat([before_keys, keys], dim=2), torch.cat([before_values, values], dim=2)
        else:
            # What is in front stays; copying it again would take longer than the attention.
            for whole, behind in zip(self._extended[layer], (keys, values), strict=True):
                whole[:, :, -behind.shape[2] :] = behind
        return self._extended[layer]

    def branch(self) -> KeyValues:
        """A copy that shares what is there, for a forward that goes another way from here on."""
        other = KeyValues()
        other._layers = dict(self._layers)
        return other
