"""Several rephrases of one edit as one risk: their mean, the worst, or a mean that a noisy rephrase cannot move.

The paper's Table 4 finds one rephrase better than several and suspects noise in the further ones (arXiv 2601.19700);
it leaves a filter open. These are three.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from odedit.objectives.common.terms import mean_over_slots
from odedit.risks.risks import Risk, masked_mean

Rephrases = Literal["single", "multiple", "worst", "trimmed", "agreeing"]
_TRIMMED = 0.25
"""Share of the rephrases that `trimmed` leaves out at either end."""


def combined(risk_EK: Risk, present_EK: Tensor, rephrases: Rephrases, agreement_EK: Tensor | None = None) -> Risk:
    """Risk of every edit from the risks of its K rephrases, `(E,)`.

    Args:
        risk_EK: Risk of each rephrase alone.
        present_EK: Presence of the rephrases.
        rephrases: `single`: mean. `worst`: largest. `trimmed`: mean without the largest and the smallest quarter.
            `agreeing`: mean weighted by `agreement_EK`.
        agreement_EK: Result of `agreement`; only for `agreeing`.
    """
    if rephrases == "agreeing":
        assert agreement_EK is not None, "agreeing weighs by agreement"
        return Risk(*((agreement_EK * part).sum(dim=1) for part in risk_EK))
    if rephrases == "worst":
        worst_E1 = risk_EK.value.detach().masked_fill(~present_EK, -torch.inf).argmax(dim=1, keepdim=True)
        return Risk(*(part.gather(1, worst_E1).squeeze(1) for part in risk_EK))
    if rephrases == "trimmed":
        present_EK = _inner(risk_EK.value.detach(), present_EK)
    return mean_over_slots(risk_EK, present_EK)


def _inner(value_EK: Tensor, present_EK: Tensor) -> Tensor:
    """True at present values that are neither among the smallest nor among the largest, `(E, K)`."""
    rank_EK = value_EK.masked_fill(~present_EK, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    count_E1 = present_EK.sum(dim=1, keepdim=True)
    trimmed_E1 = (_TRIMMED * count_E1).floor()
    return present_EK & (rank_EK >= trimmed_E1) & (rank_EK < count_E1 - trimmed_E1)


@torch.no_grad()
def agreement(moved_EKTD: Tensor, mask_EKT: Tensor) -> Tensor:
    """Weights of K rephrases by how far the edit moves their states in a common direction, `(E, K)`, sum 1.

    The weight of a rephrase is the mean cosine of its mean displacement with those of the others, at least 0. Without
    any agreement, as before the first step, all present rephrases weigh the same.

    Args:
        moved_EKTD: Edited minus unedited states.
        mask_EKT: True at real states.
    """
    present_EK = mask_EKT.any(dim=-1)
    mean_EKD = masked_mean(moved_EKTD.movedim(-1, 2), mask_EKT.unsqueeze(2))
    unit_EKD = functional.normalize(mean_EKD, dim=-1) * present_EK.unsqueeze(-1)
    cosine_EK = (unit_EKD * (unit_EKD.sum(dim=1, keepdim=True) - unit_EKD)).sum(dim=-1).clamp_min(0.0)
    total_E1 = cosine_EK.sum(dim=1, keepdim=True)
    equal_EK = present_EK / present_EK.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(total_E1 > 0, cosine_EK / total_E1.clamp_min(1e-12), equal_EK)
