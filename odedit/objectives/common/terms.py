"""The terms of an objective, and the forward that they are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from odedit.editors.base import Editor, Trace
from odedit.inputs.batch import REPHRASE_SLOTS, Answers, EditBatch, EditParams
from odedit.risks import risks
from odedit.risks.risks import Risk
from odedit.risks.tokens import Tokens
from odedit.runtime.brief import brief

TERMS = ("rel", "loc", "gen", "own")
"""Terms that every objective reports and the multiplier reads, in this order."""
ENVIRONMENTS = ("rel", "loc", "gen", *REPHRASE_SLOTS)
"""Order of scale gradients in the multiplier's input; environments with other names follow, sorted."""
COMPARED = "locality"
"""Key of the compared sequences' tokens in `Forward.tokens`."""


@dataclass(frozen=True)
class Terms:
    """Terms of E edits at one phi_e; every tensor is `(E,)`.

    Attributes:
        risks: Unweighted value of every term: `TERMS`, then the objective's further terms.
        total: Weighted sum of the terms: G without the penalty.
        scale_gradients: Derivative of each environment's risk with respect to the scale of the final states.
        penalty: `( sum |g| )^2` over the environments.
        worst_nll: Largest NLL among the tokens of the edit's answer.
        worst_trained_nll: Largest NLL among the tokens of all answers whose likelihood is trained.
        all_right: True when every token of the edit's answer is the model's first choice.
    """

    risks: dict[str, Tensor]
    total: Tensor
    scale_gradients: dict[str, Tensor]
    penalty: Tensor
    worst_nll: Tensor
    worst_trained_nll: Tensor
    all_right: Tensor

    __repr__ = brief

    def multiplier_inputs(self) -> tuple[Tensor, Tensor]:
        """Input of the multiplier: risks `(E, len(TERMS))` and scale gradients `(E, environments)`.

        The list is fixed: a further term of an objective changes neither the input nor the width of the network.
        """
        known = [name for name in ENVIRONMENTS if name in self.scale_gradients]
        order = known + sorted(self.scale_gradients.keys() - set(known))
        return (
            torch.stack([self.risks[name] for name in TERMS], 1),
            torch.stack([self.scale_gradients[name] for name in order], 1),
        )


@dataclass(frozen=True)
class Unedited:
    """Outputs of the unedited model at the M answer tokens of the compared sequences.

    Attributes:
        states_MD: Final hidden states.
        log_q_MV: Log-probabilities; None: each step computes them from the states, some rows at a time (too many to
            store, or read only once).
        weight_EK: Weight of each sequence of the batch in R_loc; None: the mean over the sequences.
        states_EKTD: Final hidden states at all answers of the batch; None unless the objective `reads_displacements`.
    """

    states_MD: Tensor
    log_q_MV: Tensor | None = None
    weight_EK: Tensor | None = None
    states_EKTD: Tensor | None = None

    __repr__ = brief


@dataclass(frozen=True)
class Forward:
    """One forward of the edited model, from which the terms are computed.

    Attributes:
        editor: Editor of the edits.
        params: phi_e.
        trace: Values recorded by the editor's hooks.
        batch: Sequences that the step reads.
        hidden: Final hidden states at the positions of `Objective.read`.
        states_EKTD: Final hidden states at the positions that predict the answers.
        tokens: Risks of single tokens: NLL by slot, and KL of all compared sequences as `COMPARED`.
        unedited: Outputs of the unedited model; None unless the objective `compares`.
    """

    editor: Editor
    params: EditParams
    trace: Trace
    batch: EditBatch
    hidden: Tensor
    states_EKTD: Tensor
    tokens: Mapping[str, Tokens]
    unedited: Unedited | None = None

    __repr__ = brief

    def likelihood(self, slot: str) -> Risk:
        """Mean NLL of one sequence's answer, `(E,)`."""
        value_E1, slope_E1 = token_means(self.tokens[slot], self.batch.answers((slot,)))
        return Risk(value_E1.squeeze(1), slope_E1.squeeze(1))

    def worst_nll(self, slot: str) -> Tensor:
        """Largest NLL of one sequence's answer tokens, `(E,)`."""
        nll_M = self.tokens[slot].kept[:, 1]
        return self.batch.answers((slot,)).spread(nll_M, -torch.inf).flatten(1).amax(dim=-1)

    def no_risk(self) -> Risk:
        """Value of a term that the objective does not use."""
        zero_E = torch.zeros(self.batch.num_edits, device=self.hidden.device)
        return Risk(zero_E, zero_E)


def mean_over_slots(risk_EK: Risk, present_EK: Tensor) -> Risk:
    """Mean over the sequences that each edit has, `(E,)`."""
    return Risk(risks.masked_mean(risk_EK.value, present_EK), risks.masked_mean(risk_EK.scale_gradient, present_EK))


def token_means(tokens: Tokens, answers: Answers) -> Risk:
    """Mean over each sequence's answer tokens, `(E, K)`."""
    value, slope = (risks.masked_mean(answers.spread(v), answers.mask_EKT) for v in tokens[:2])
    return Risk(value, slope)


def weighted_sum(weights: Mapping[str, float], values: Mapping[str, Tensor]) -> Tensor:
    """Weighted sum of `TERMS` and of the further terms whose weight is not 0, `(E,)`."""
    total_E = torch.stack([weights[name] * values[name] for name in TERMS]).sum(dim=0)
    for name, value_E in values.items():
        if name not in TERMS and weights[name]:
            total_E = total_E + weights[name] * value_E
    return total_E
