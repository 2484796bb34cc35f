"""Contrast, an objective of this project: reliability, generality and locality by the likelihoods that are scored.

    G = NLL(edit) + w_gen NLL(rephrase) + w_loc sum_k v_k KL(p_k || q_k),     v_k = 2, or 0 for the same thing

p is the edited model, q the unedited one. The rephrase asks in other words about another picture
(`EditRequest.rephrase`). Sequence k is a hard negative, the edit's question about a similar picture (see
`odedit.data.negatives`); each step reads some of the negatives, in turn. A picture about which the unedited model
greedily gives the answer that the edit replaces shows the same thing: it is no negative. `positives` of these pictures
are trained to the new answer instead, as further rephrases.

An edit stops when the least likely answer token of the edit *and* of the rephrase has reached the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import Editor
from odedit.errors import InputError
from odedit.inputs.batch import NEAR, REPHRASE_SLOTS, EditBatch, is_negative
from odedit.objectives.base import ComparingConfig, require, rows_at_once
from odedit.objectives.common.rephrased import Rephrased, RephrasedConfig

_NEGATIVE_WEIGHT = 2.0
"""Weight of a negative relative to an NLL, chosen on the validation split of the embedded world."""


@dataclass(frozen=True)
class ContrastConfig(RephrasedConfig, ComparingConfig):
    """Settings of the contrast objective.

    Attributes:
        reliability_weight: Weight of the edit's NLL.
        generality_weight: Weight of the rephrase's NLL; 0 leaves the rephrase out.
        locality_weight: Weight of the negatives' KL; 0 leaves it out.
        negatives: Number of hard negatives per edit.
        negatives_at_once: Number of hard negatives that one step reads.
        positives: Number of pool pictures of the same thing, the nearest ones, that are trained to the new answer.
    """

    negatives: int = 12
    negatives_at_once: Annotated[int, Ge(1)] = 2
    positives: Annotated[int, Ge(0)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.negatives >= self.negatives_at_once
        require("negatives", self.negatives, fits, f"at least negatives_at_once ({self.negatives_at_once})")

    @property
    def supervision_slots(self) -> tuple[str, ...]:
        # The record's near picture becomes the first negative.
        return (*(REPHRASE_SLOTS if self.joins_rephrases else ()), NEAR)

    @property
    def num_negatives(self) -> int:
        return self.negatives

    @property
    def num_positives(self) -> int:
        return self.positives

    @property
    def takes_turns(self) -> bool:
        return self.negatives > self.negatives_at_once

    def check(self, editor: Editor) -> None:
        super().check(editor)
        if self.takes_turns and editor.length_varies:
            raise InputError(
                f"objective.name: {self.name!r} reads other pictures in each step, but with these settings the editor "
                "keeps the activations of the first step; set editor.clamp or a mask of entries, or set "
                "objective.negatives to objective.negatives_at_once."
            )


class Contrast(Rephrased):
    Config = ContrastConfig

    def slots(self, editor: Editor, batch: EditBatch) -> tuple[str, ...]:
        negatives = self.compared_slots(batch)
        if not negatives:
            raise InputError(
                f"objective.name: {self.config.name!r} reads hard negatives, and this batch has none; pass a "
                "NegativePool to encode_requests."
            )
        trained = super().slots(editor, batch)
        return tuple(slot for slot in batch.slots if slot in trained or slot in negatives)

    def slots_within(self, slots: Sequence[str], steps: int) -> tuple[str, ...]:
        # Negatives are the last slots of a batch, read in their order.
        negatives = [slot for slot in slots if is_negative(slot)]
        read = steps * self.config.negatives_at_once if self.config.takes_turns else len(negatives)
        return tuple(slot for slot in slots if slot not in negatives[read:])

    def columns_in_turn(self, slots: Sequence[str], present_EK: Tensor, steps_E: Tensor) -> Tensor | None:
        read = self.slots_at_once(slots)
        if len(read) == len(slots):
            return None
        first = len(slots) - sum(map(is_negative, slots))
        at_once = len(read) - first
        # The negatives that an edit has, in their order, then those that it lacks.
        order_EN = present_EK[:, first:].long().argsort(dim=1, descending=True, stable=True)
        count_E1 = present_EK[:, first:].sum(1, keepdim=True).clamp_min(1)
        fixed_EK = torch.arange(first, device=steps_E.device).expand(len(steps_E), -1)
        turn_EK = steps_E.long().unsqueeze(1) * at_once + torch.arange(at_once, device=steps_E.device)
        return torch.cat([fixed_EK, first + order_EN.gather(1, turn_EK % count_E1)], dim=1)

    def in_turn(self, batch: EditBatch, turn: int) -> EditBatch:
        turn_E = torch.full((batch.num_edits,), turn, device=batch.tokens_EKS.device)
        columns_EK = self.columns_in_turn(batch.slots, batch.present_EK, turn_E)
        if columns_EK is None:
            return batch
        read = batch.select(self.slots_at_once(batch.slots))
        # An edit with fewer negatives than a step reads must not count a negative twice.
        return replace(
            batch.pick(read.slots, columns_EK), present_EK=read.present_EK, target_mask_EKT=read.target_mask_EKT
        )

    def compared_slots(self, batch: EditBatch) -> tuple[str, ...]:
        return tuple(filter(is_negative, batch.slots))

    @torch.no_grad()
    def weights_of_locality(self, backbone: Backbone, batch: EditBatch, states_EKTD: Tensor) -> Tensor:
        """v_k of every negative, 0 for the other sequences, `(E, K)`."""
        answers = batch.answers(self.compared_slots(batch))
        states_MD = batch.states_at(states_EKTD, answers)
        size = max(1, rows_at_once(backbone, states_MD.device) // 2)
        parts = [
            backbone.head(states_CD).argmax(dim=-1) == tokens_C
            for states_CD, tokens_C in zip(states_MD.split(size), answers.tokens_M.split(size), strict=True)
        ]
        shows_same_EK = answers.spread(torch.cat(parts).float(), 1.0).flatten(2).bool().all(dim=-1)
        weight_EK = torch.zeros(batch.present_EK.shape, device=shows_same_EK.device)
        return weight_EK.index_copy(1, answers.columns_K, _NEGATIVE_WEIGHT * (~shows_same_EK).float())


OBJECTIVE = Contrast
