"""Contrastive losses, and small encoders as functions of named weights.

References:
    InfoNCE: arXiv 1807.03748. The two losses of UniKE: arXiv 2409.19872, eq. 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def encoder_weights(width: int, hidden: int, code: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Initial weights of a perceptron with one hidden layer, from `width` to `code`; biases are 0."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    return {
        "in.weight": matrix(hidden, width),
        "in.bias": torch.zeros(hidden),
        "out.weight": matrix(code, hidden),
        "out.bias": torch.zeros(code),
    }


def encode(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Unit codes `(..., P)` of states `(..., D)`, independent of the states' norms."""
    scaled = F.normalize(states, dim=-1) * math.sqrt(states.shape[-1])
    hidden = F.linear(scaled, weights["in.weight"], weights["in.bias"]).relu()
    return F.normalize(F.linear(hidden, weights["out.weight"], weights["out.bias"]), dim=-1)


def info_nce(scores_EN: Tensor, positive_EN: Tensor, negative_EN: Tensor, temperature: float) -> Tensor:
    """InfoNCE: mean over an anchor's positives p of `-log( e^{s_p} / (e^{s_p} + sum over negatives e^{s_n}) )`.

    Args:
        scores_EN: Cosine of each of E anchors with each of N candidates.
        positive_EN: True at an anchor's positives.
        negative_EN: True at an anchor's negatives; a candidate may be neither.
        temperature: Divisor of the cosines.

    Returns:
        Loss `(E,)`; 0 for an anchor without positives.
    """
    logits_EN = scores_EN / temperature
    against_E1 = logits_EN.masked_fill(~negative_EN, -torch.inf).logsumexp(dim=-1, keepdim=True)
    each_EN = torch.logaddexp(logits_EN, against_E1) - logits_EN
    return torch.where(positive_EN, each_EN, 0.0).sum(dim=-1) / positive_EN.sum(dim=-1).clamp(min=1)


def two_camps(true_EP: Tensor, false_EP: Tensor, temperature: float) -> Tensor:
    """Truthfulness loss (UniKE, eq. 4), `(E,)`: pulls each camp's codes together and pushes the two camps apart.

    Mean over `h+_e` and `h-_e` of `-log( sum over its own camp e^s / sum over both camps e^s )`. As published, a code
    belongs to its own camp's sum.

    Args:
        true_EP: Unit codes of states after the right answer.
        false_EP: Unit codes of states after the wrong answer.
        temperature: Divisor of the cosines s.
    """
    both_NP = torch.cat([true_EP, false_EP])
    logits_NN = both_NP @ both_NP.T / temperature
    is_true_N = torch.arange(len(both_NP), device=both_NP.device) < len(true_EP)
    same_NN = is_true_N.unsqueeze(0) == is_true_N.unsqueeze(1)
    loss_N = logits_NN.logsumexp(dim=-1) - logits_NN.masked_fill(~same_NN, -torch.inf).logsumexp(dim=-1)
    return loss_N.reshape(2, -1).mean(dim=0)
