"""NLL of the edit and of its rephrases, which `rephrase` minimises alone and `contrast` beside its negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge

from odedit.editors.base import Editor
from odedit.inputs.batch import EDIT, REPHRASE, REPHRASE_SLOTS, EditBatch, unnumbered
from odedit.objectives.base import BaseConfig, Objective
from odedit.objectives.common.terms import Forward, mean_over_slots
from odedit.risks.risks import Risk


@dataclass(frozen=True)
class RephrasedConfig(BaseConfig):
    """Settings of objectives that train the rephrases' likelihood.

    Attributes:
        generality_weight: Weight of the rephrases' mean NLL; 0 leaves the rephrases out.
    """

    generality_weight: Annotated[float, Ge(0)] = 1.0

    @property
    def weights(self) -> dict[str, float]:
        return super().weights | {"gen": self.generality_weight}

    @property
    def supervision_slots(self) -> tuple[str, ...]:
        return REPHRASE_SLOTS if self.joins_rephrases else ()

    @property
    def joins_rephrases(self) -> bool:
        return self.generality_weight > 0


class Rephrased(Objective):
    """NLL of the edit and mean NLL of its rephrases. An edit stops when all of them are learned.

    A rephrase asks in other words about another picture (`EditRequest.rephrase`); `supervision.rephrases` is their
    number.
    """

    config: Any

    def slots(self, editor: Editor, batch: EditBatch) -> tuple[str, ...]:
        # The two rephrases are read as one sequence.
        wanted = self.config.base_slots(editor).union((REPHRASE,) if self.config.joins_rephrases else ())
        return tuple(slot for slot in batch.slots if unnumbered(slot) in wanted)

    def likelihood_slots(self, batch: EditBatch) -> tuple[str, ...]:
        return (EDIT, *(slot for slot in batch.slots if unnumbered(slot) == REPHRASE))

    def trained_slots(self, batch: EditBatch) -> tuple[str, ...]:
        return self.likelihood_slots(batch)

    def generality(self, forward: Forward) -> Risk:
        """Mean NLL of the answers to the rephrases that an edit has; 0 without any."""
        slots = self.likelihood_slots(forward.batch)[1:]
        if not slots:
            return forward.no_risk()
        risks = [forward.likelihood(slot) for slot in slots]
        risk_EK = Risk(*(torch.stack(values, dim=1) for values in zip(*risks, strict=True)))
        return mean_over_slots(risk_EK, forward.batch.answers(slots).present_EK)
