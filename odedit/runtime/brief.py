"""A short `repr` of dataclasses with large tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

_SHOWN = 6
"""Longest collection whose entries are shown; of longer ones only the length is shown."""


def brief(value: Any) -> str:
    """A `__repr__` for dataclasses, with tensors and arrays by their shape.

    >>> import torch
    >>> from odedit.editing.curves import EditResult
    >>> EditResult("first", {"w": torch.zeros(1, 3)}, 20, "converged", 0.5)
    EditResult(edit_id='first', params={'w': Tensor(1, 3)}, steps=20, stop_reason='converged', seconds=0.5, \
curves={}, error=None)
    """
    shown = [f"{item.name}={_shown(getattr(value, item.name))}" for item in fields(value) if item.repr]
    return f"{type(value).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{'Tensor' if isinstance(value, Tensor) else 'array'}({', '.join(map(str, value.shape))})"
    if isinstance(value, Mapping):
        entries = [f"{key!r}: {_shown(entry)}" for key, entry in value.items()]
        return f"{{{_listed(entries)}}}"
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        entries = [_shown(entry) for entry in value]
        return f"[{_listed(entries)}]" if isinstance(value, list) else f"({_listed(entries)})"
    return repr(value)


def _listed(entries: list[str]) -> str:
    return ", ".join(entries) if len(entries) <= _SHOWN else f"{len(entries)} values"
