"""Dataclasses in one line, however large their tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

_SHOWN = 6
"""Entries of a collection; of a longer one only their number is shown."""


def brief(value: Any) -> str:
    """The `__repr__` of a dataclass with tensors: those, and arrays, by their shape.

    >>> import torch
    >>> from odedit.editing.curves import EditResult
    >>> EditResult("first", {"w": torch.zeros(1, 3)}, 20, "converged", 0.5)
    EditResult(edit_id='first', params={'w': Tensor(1, 3)}, steps=20, stop_reason='converged', seconds=0.5, \
curves={}, error=None)
    """
    shown = [f"{one.name}={_shown(getattr(value, one.name))}" for one in fields(value) if one.repr]
    return f"{type(value).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{'Tensor' if isinstance(value, Tensor) else 'array'}({', '.join(map(str, value.shape))})"
    if isinstance(value, Mapping):
        inside = [f"{key!r}: {_shown(one)}" for key, one in value.items()]
        return f"{{{_listed(inside)}}}"
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        inside = [_shown(one) for one in value]
        return f"[{_listed(inside)}]" if isinstance(value, list) else f"({_listed(inside)})"
    return repr(value)


def _listed(inside: list[str]) -> str:
    return ", ".join(inside) if len(inside) <= _SHOWN else f"{len(inside)} values"
