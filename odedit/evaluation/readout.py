"""Answers of a model to the probes of a batch, and a store of those of the unedited model.

The unedited model answers a probe alike whichever edit is scored, so that several runs over the same records in one
process ask it once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from odedit.backbones.common.generation import NO_TOKEN
from odedit.inputs.batch import EditBatch, is_locality
from odedit.runtime.brief import brief
from odedit.runtime.lru import LRU


@dataclass(frozen=True)
class Readout:
    """Answers of one model to every probe of a batch, with R first choices per position.

    Attributes:
        top_EKTR: First choices at the positions that predict the target; undefined at padding.
        top_EKSR: First choices at every position of the locality probes; None: not measured.
        greedy_EKT: Answers as `generate` returns them; None: not measured.
    """

    top_EKTR: Tensor
    top_EKSR: Tensor | None
    greedy_EKT: Tensor | None

    __repr__ = brief

    def on_host(self) -> Readout:
        everywhere, generated = (None if value is None else value.cpu() for value in (self.top_EKSR, self.greedy_EKT))
        return Readout(self.top_EKTR.cpu(), everywhere, generated)


class _Cell(NamedTuple):
    """Answers to one probe, without padding, on the CPU; see `Readout`."""

    top_TR: Tensor
    top_SR: Tensor | None
    greedy_T: Tensor | None

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self if value is not None)


class UneditedAnswers:
    """Readouts of one unedited model, by the content of the probes.

    Args:
        max_bytes: Memory of the store; the least recently read probes are dropped.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self._cells: LRU[_Cell] = LRU(max_bytes)

    def readout(self, batch: EditBatch, measured: Hashable, ask: Callable[[], Readout]) -> Readout:
        """The stored answers to a batch, on the CPU; unless all probes are known, the result of `ask`, which is stored.

        Args:
            measured: Settings that decide what is measured.
        """
        keys, counts = _keys(batch, measured)
        known = {at: self._cells.get(key) for at, key in keys.items()}
        cells = {at: cell for at, cell in known.items() if cell is not None}
        if keys and len(cells) == len(keys):
            return _assembled(batch, cells)
        readout = ask().on_host()
        for at, key in keys.items():
            cell = _cell(readout, at, *counts[at], is_compared=is_locality(batch.slots[at[1]]))
            self._cells.put(key, cell, cell.bytes)
        return readout


_At = tuple[int, int]
"""Edit and slot of a probe, by number."""


def _keys(batch: EditBatch, measured: Hashable) -> tuple[dict[_At, Hashable], dict[_At, tuple[int, int]]]:
    """Content of each present probe, and its numbers of positions and of target tokens."""
    tokens_EKS, real_EKS, mask_EKT, first_EK, picture_EK, present_EK = (
        part.cpu().numpy()
        for part in (
            batch.tokens_EKS, batch.real_EKS, batch.target_mask_EKT, batch.predict_EKT[..., 0], batch.picture_EK,
            batch.present_EK,
        )
    )  # fmt: skip
    keys: dict[_At, Hashable] = {}
    counts: dict[_At, tuple[int, int]] = {}
    for e, k in zip(*present_EK.nonzero(), strict=True):
        at = int(e), int(k)
        positions, targets = int(real_EKS[at].sum()), int(mask_EKT[at].sum())
        picture = batch.pictures[picture_EK[at]] if picture_EK[at] >= 0 else None
        tokens = tokens_EKS[at][:positions].tobytes()
        keys[at] = tokens, int(first_EK[at]), picture, is_locality(batch.slots[at[1]]), measured
        counts[at] = positions, targets
    return keys, counts


def _cell(readout: Readout, at: _At, positions: int, targets: int, *, is_compared: bool) -> _Cell:
    everywhere, greedy = readout.top_EKSR if is_compared else None, readout.greedy_EKT
    # Copies: a view would keep the whole batch.
    return _Cell(
        readout.top_EKTR[at][:targets].clone(),
        None if everywhere is None else everywhere[at][:positions].clone(),
        None if greedy is None else greedy[at].clone(),
    )


def _assembled(batch: EditBatch, cells: Mapping[_At, _Cell]) -> Readout:
    """Readout of a batch from the answers to its probes; padding is zero, or no token."""
    first = next(iter(cells.values()))
    shape, num_choices = batch.target_EKT.shape, first.top_TR.shape[-1]
    top_EKTR = torch.zeros(*shape, num_choices, dtype=torch.long)
    everywhere = None
    if any(cell.top_SR is not None for cell in cells.values()):
        everywhere = torch.zeros(*batch.tokens_EKS.shape, num_choices, dtype=torch.long)
    greedy = None
    if first.greedy_T is not None:
        longest = max(len(cell.greedy_T) for cell in cells.values() if cell.greedy_T is not None)
        greedy = torch.full((*shape[:2], longest), NO_TOKEN)
    for at, cell in cells.items():
        top_EKTR[at][: len(cell.top_TR)] = cell.top_TR
        if everywhere is not None and cell.top_SR is not None:
            everywhere[at][: len(cell.top_SR)] = cell.top_SR
        if greedy is not None and cell.greedy_T is not None:
            greedy[at][: len(cell.greedy_T)] = cell.greedy_T
    return Readout(top_EKTR, everywhere, greedy)
