"""R_rel and R_loc, each with its gradient with respect to the dummy scalar classifier w.

The invariance penalty (arXiv 2601.19700, eq. 9-11) needs `d R / d w` at w = 1, where w multiplies the hidden state
after the final layer norm. The language heads here have no bias, so that w scales the logits and the derivative has a
closed form in the probabilities. One forward pass gives the risk *and* its scale gradient, both differentiable once:
training on the penalty takes one backward pass.

For `p = softmax(w z)`, `d log p_v / d w = z_v - E_p[z]`. As log p differs from z by a constant, z is log p below:

    NLL          g = mean_t( NLL_t - H(p_t) )
    KL(p || q)   g = mean_t Cov_{p_t}( log p_t, log p_t - log q_t )
    KL(q || p)   g = mean_t( CE(q_t, p_t) - H(p_t) )

Risks are per edit, since the edits of a batch are independent optimisations. Leading dimensions are free: the suffix
`ET` (see `odedit.inputs.batch`) stands for `(..., T)`. Half-precision inputs are computed in float32.

References:
    "Out-of-Distribution Generalization via Invariant Trajectories for Multimodal Large Language Model Editing",
    arXiv 2601.19700, eq. 2-6 and 9-11; the dummy classifier is IRMv1's (arXiv 1907.02893).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from odedit.risks.tokens import KL, NLL, Direction, Tokens, token_risks


class Risk(NamedTuple):
    """One risk of every edit.

    Attributes:
        value: Risk, `(E,)`.
        scale_gradient: Derivative of the risk with respect to w at w = 1, `(E,)`; differentiable like the value.
    """

    value: Tensor
    scale_gradient: Tensor


def upcast(values: Tensor) -> Tensor:
    """Values in float32; float32 and float64 unchanged."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def masked_mean(values_ET: Tensor, mask_ET: Tensor) -> Tensor:
    """Mean over the last axis where the mask is True; 0, with gradient 0, for an empty mask.

    Values outside the mask may be infinite or NaN.

    >>> masked_mean(torch.tensor([[1.0, 3.0, float("nan")]]), torch.tensor([[True, True, False]]))
    tensor([2.])
    """
    total_E = values_ET.masked_fill(~mask_ET, 0.0).sum(-1)
    return total_E / mask_ET.sum(-1).clamp_min(1)


def reliability(logits_ETV: Tensor, target_ET: Tensor, mask_ET: Tensor, label_smoothing: float = 0.0) -> Risk:
    """R_rel: the mean negative log-likelihood of the edit's target tokens.

    The scale gradient, NLL - H, is positive while the target's NLL exceeds the entropy of the prediction, and negative
    after that.

    Args:
        logits_ETV: Logits at the positions that predict the target.
        target_ET: Token ids; any value outside the mask.
        mask_ET: True at the target's tokens. A row without tokens has risk and gradient 0.
        label_smoothing: Share of the uniform distribution over the vocabulary in the target; g = value - H as before.
    """
    (tokens,) = token_risks(upcast(logits_ETV[mask_ET]), [NLL(target_ET[mask_ET], label_smoothing)])
    return mean_of_tokens(tokens, mask_ET)


def locality(
    logits_edited_ETV: Tensor,
    logits_base_ETV: Tensor,
    mask_ET: Tensor,
    direction: Direction = "edited_first",
) -> Risk:
    """R_loc: the divergence between edited and unedited predictions on prompts that must not change.

    Args:
        logits_edited_ETV: Logits p of the edited model.
        logits_base_ETV: Logits q of the unedited model: constants that w does not scale.
        mask_ET: True at the compared positions. A row without positions has risk and gradient 0.
        direction: `edited_first` is the paper's KL(p || q), which penalises probability added where the unedited model
            has none; `base_first` is KL(q || p) of common editing code, which penalises probability removed.

    Raises:
        ValueError: Unknown direction.
    """
    log_q_MV = log_probs(logits_base_ETV[mask_ET]).detach()
    (tokens,) = token_risks(upcast(logits_edited_ETV[mask_ET]), [KL(log_q_MV, direction)])
    return mean_of_tokens(tokens, mask_ET)


def mean_of_tokens(tokens: Risk | Tokens, mask_ET: Tensor) -> Risk:
    """Means over the tokens of each edit, `(E,)`, from the M tokens where the mask is True, in its order."""

    def mean(values_M: Tensor) -> Tensor:
        return masked_mean(values_M.new_zeros(mask_ET.shape).masked_scatter(mask_ET, values_M), mask_ET)

    return Risk(mean(tokens.value), mean(tokens.scale_gradient))


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities, at least float32."""
    return upcast(logits).log_softmax(-1)
