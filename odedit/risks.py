"""R_rel and R_loc, each with its gradient with respect to the dummy scalar classifier w.

The invariance penalty (arXiv 2601.19700, eq. 9-11) needs `d R / d w` at w = 1, where w multiplies the hidden
state behind the final layer norm. The language heads edited here have no bias, so w scales the logits, and the
derivative has a closed form in the probabilities. One forward pass therefore yields the risk *and* its scale
gradient, both differentiable once: training on the penalty takes a single backward pass.

For `p = softmax(w z)`, `d log p_v / d w = z_v - E_p[z]`, and since log p differs from z by a constant, z can be
read as log p everywhere:

    NLL          g = mean_t( NLL_t - H(p_t) )
    KL(p || q)   g = mean_t Cov_{p_t}( log p_t, log p_t - log q_t )
    KL(q || p)   g = mean_t( CE(q_t, p_t) - H(p_t) )

Nothing is reduced over edits: the edits of a batch are independent optimisations. Leading dimensions are free;
the suffix `ET` (see `odedit.edits`) stands for `(..., T)`. Half-precision inputs are computed in float32.

References:
    "Out-of-Distribution Generalization via Invariant Trajectories for Multimodal Large Language Model Editing",
    arXiv 2601.19700, eq. 2-6 and 9-11; the dummy classifier is IRMv1's (arXiv 1907.02893).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Direction = Literal["edited_first", "base_first"]


class Risk(NamedTuple):
    """One risk of every edit.

    Attributes:
        value: The risk, `(E,)`.
        scale_gradient: Its derivative with respect to w at w = 1, `(E,)`; differentiable like the value.
    """

    value: Tensor
    scale_gradient: Tensor


def upcast(values: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def target_nll(logits_ETV: Tensor, target_ET: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, `(E, T)`."""
    return _nll(log_probs(logits_ETV), target_ET)


def entropy(logits_ETV: Tensor) -> Tensor:
    """Entropy of each predicted distribution in nats, `(E, T)`.

    >>> bool(torch.isclose(entropy(torch.zeros(2, 8)).exp(), torch.tensor(8.0)).all())
    True
    """
    return _entropy(log_probs(logits_ETV))


def masked_mean(values_ET: Tensor, mask_ET: Tensor) -> Tensor:
    """Mean over the last axis where the mask is True; 0, with gradient 0, where it is True nowhere.

    Values outside the mask may be infinite or NaN.

    >>> masked_mean(torch.tensor([[1.0, 3.0, float("nan")]]), torch.tensor([[True, True, False]]))
    tensor([2.])
    """
    total_E = values_ET.masked_fill(~mask_ET, 0.0).sum(-1)
    return total_E / mask_ET.sum(-1).clamp_min(1)


def reliability(logits_ETV: Tensor, target_ET: Tensor, mask_ET: Tensor, label_smoothing: float = 0.0) -> Risk:
    """R_rel: the mean negative log-likelihood of the edit's target tokens.

    Its scale gradient is positive while the model is less sure of the target than of its own predictions, and
    turns negative once the target is more likely than the entropy suggests.

    Args:
        logits_ETV: Logits at the positions that predict the target.
        target_ET: Token ids; any value outside the mask.
        mask_ET: True at the target's tokens. A row without any has risk and gradient 0.
        label_smoothing: Share of the likelihood of a uniform draw from the vocabulary; g = value - H all the same.
    """
    return mean_of_tokens(token_nll(logits_ETV[mask_ET], target_ET[mask_ET], label_smoothing), mask_ET)


def locality(
    logits_edited_ETV: Tensor,
    logits_base_ETV: Tensor,
    mask_ET: Tensor,
    direction: Direction = "edited_first",
) -> Risk:
    """R_loc: the divergence between edited and unedited predictions on prompts that must not change.

    Args:
        logits_edited_ETV: Logits p of the edited model.
        logits_base_ETV: Logits q of the unedited model: a constant, no gradient reaches them, w does not scale them.
        mask_ET: True at the compared positions. A row without any has risk and gradient 0.
        direction: `edited_first` is the paper's KL(p || q); `base_first` is KL(q || p), which common editing
            code uses. The former punishes mass put where the unedited model had none, the latter mass taken away.

    Raises:
        ValueError: For any other direction.
    """
    log_q_MV = log_probs(logits_base_ETV[mask_ET]).detach()
    return mean_of_tokens(token_kl(logits_edited_ETV[mask_ET], log_q_MV, direction), mask_ET)


def mean_of_tokens(tokens: Risk, mask_ET: Tensor) -> Risk:
    """From the M tokens that are there, in the order of the mask, to their means, `(E,)`."""

    def mean(values_M: Tensor) -> Tensor:
        return masked_mean(values_M.new_zeros(mask_ET.shape).masked_scatter(mask_ET, values_M), mask_ET)

    return Risk(mean(tokens.value), mean(tokens.scale_gradient))


def token_nll(logits_MV: Tensor, target_M: Tensor, label_smoothing: float = 0.0) -> Risk:
    """NLL and scale gradient of M single tokens, `(M,)` each; arguments as of `reliability`."""
    return Risk(*_TokenNLL.apply(upcast(logits_MV), target_M, label_smoothing))


def token_kl(logits_MV: Tensor, log_q_MV: Tensor, direction: Direction = "edited_first") -> Risk:
    """Divergence and scale gradient at M single positions, `(M,)` each.

    Args:
        logits_MV: Of the edited model.
        log_q_MV: Log-probabilities of the unedited model; a constant.
        direction: As of `locality`. ValueError for an unknown one.
    """
    if direction not in get_args(Direction):
        raise ValueError(f"direction: got {direction!r}, expected one of {', '.join(get_args(Direction))}.")
    kind = _ForwardKL if direction == "edited_first" else _ReverseKL
    return Risk(*kind.apply(upcast(logits_MV), log_q_MV))


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses `create_graph`: torch's decorator of that name would let a part of the second derivative be missing."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("risks are differentiable once; their scale gradient is there without create_graph.")
        return backward(ctx, *grads)

    return checked


class _TokenNLL(torch.autograd.Function):
    """Value and scale gradient with closed-form gradients: one tensor of the size of the logits is kept, not six.

    With u = log p:  d NLL / d z = p - y,  d g / d z = p - y + p (u + H).
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, target_M: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        log_p_MV = logits_MV.log_softmax(-1)
        entropy_M = _entropy(log_p_MV)
        nll_M = _nll(log_p_MV, target_M)
        if smoothing:
            nll_M = (1 - smoothing) * nll_M - smoothing * log_p_MV.mean(-1)
        ctx.save_for_backward(log_p_MV, entropy_M, target_M)
        ctx.smoothing = smoothing
        ctx.set_materialize_grads(False)
        return nll_M, nll_M - entropy_M

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, value_M: Tensor | None, slope_M: Tensor | None) -> tuple[Tensor | None, None, None]:
        log_p_MV, entropy_M, target_M = ctx.saved_tensors
        both_M = _sum(value_M, slope_M)
        if both_M is None:
            return None, None, None
        if slope_M is None:
            grad_MV = log_p_MV.exp().mul_(both_M.unsqueeze(-1))
        else:
            grad_MV = torch.addcmul((both_M + slope_M * entropy_M).unsqueeze(-1), slope_M.unsqueeze(-1), log_p_MV)
            grad_MV.mul_(log_p_MV.exp())
        grad_MV.scatter_add_(1, target_M.unsqueeze(-1), -(1 - ctx.smoothing) * both_M.unsqueeze(-1))
        if ctx.smoothing:
            grad_MV -= (ctx.smoothing / log_p_MV.shape[-1]) * both_M.unsqueeze(-1)
        return grad_MV, None, None


class _ForwardKL(torch.autograd.Function):
    """KL(p || q). With u = log p, r = u - log q, c = u + H, s = r - KL, and g = E_p[c s]:

    d KL / d z = p s,  d g / d z = p (c s + c + s - g).
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, log_q_MV: Tensor) -> tuple[Tensor, Tensor]:
        log_p_MV = logits_MV.log_softmax(-1)
        p_MV = log_p_MV.exp()
        entropy_M = -(p_MV * log_p_MV).sum(-1)
        ratio_MV = log_p_MV - log_q_MV
        kl_M = (p_MV * ratio_MV).sum(-1)
        # Centring first keeps digits: for p close to q the terms of the formulas cancel.
        centred_MV = log_p_MV + entropy_M.unsqueeze(-1)
        slope_M = (p_MV.mul_(centred_MV) * ratio_MV.sub_(kl_M.unsqueeze(-1))).sum(-1)
        ctx.save_for_backward(log_p_MV, log_q_MV, entropy_M, kl_M, slope_M)
        ctx.set_materialize_grads(False)
        return kl_M, slope_M

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, value_M: Tensor | None, slope_M: Tensor | None) -> tuple[Tensor | None, None]:
        log_p_MV, log_q_MV, entropy_M, kl_M, g_M = ctx.saved_tensors
        both_M = _sum(value_M, slope_M)
        if both_M is None:
            return None, None
        grad_MV = (log_p_MV - log_q_MV).sub_(kl_M.unsqueeze(-1))
        if slope_M is not None:
            slope_MV = (log_p_MV + entropy_M.unsqueeze(-1)).mul_(grad_MV + 1.0).sub_(g_M.unsqueeze(-1))
            slope_MV.mul_(slope_M.unsqueeze(-1))
            grad_MV = slope_MV.addcmul_(grad_MV, both_M.unsqueeze(-1))
        else:
            grad_MV.mul_(both_M.unsqueeze(-1))
        return grad_MV.mul_(log_p_MV.exp()), None


class _ReverseKL(torch.autograd.Function):
    """KL(q || p). With u = log p and c = u + H:  d KL / d z = p - q,  g = - E_q[c],  d g / d z = p - q + p c."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, log_q_MV: Tensor) -> tuple[Tensor, Tensor]:
        log_p_MV = logits_MV.log_softmax(-1)
        entropy_M, q_MV = _entropy(log_p_MV), log_q_MV.exp()
        kl_M = (q_MV * (log_q_MV - log_p_MV)).sum(-1)
        # E_p[c] is 0; taken from the same sum, digits are kept for p close to q.
        slope_M = ((log_p_MV.exp() - q_MV) * (log_p_MV + entropy_M.unsqueeze(-1))).sum(-1)
        ctx.save_for_backward(log_p_MV, log_q_MV, entropy_M)
        ctx.set_materialize_grads(False)
        return kl_M, slope_M

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, value_M: Tensor | None, slope_M: Tensor | None) -> tuple[Tensor | None, None]:
        log_p_MV, log_q_MV, entropy_M = ctx.saved_tensors
        both_M = _sum(value_M, slope_M)
        if both_M is None:
            return None, None
        grad_MV = (log_p_MV.exp() - log_q_MV.exp()).mul_(both_M.unsqueeze(-1))
        if slope_M is not None:
            centred_MV = (log_p_MV + entropy_M.unsqueeze(-1)).mul_(slope_M.unsqueeze(-1))
            grad_MV.addcmul_(centred_MV, log_p_MV.exp())
        return grad_MV, None


def _sum(a_M: Tensor | None, b_M: Tensor | None) -> Tensor | None:
    if a_M is None or b_M is None:
        return b_M if a_M is None else a_M
    return a_M + b_M


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities, in float32 at least."""
    return upcast(logits).log_softmax(-1)


def _nll(log_p_ETV: Tensor, target_ET: Tensor) -> Tensor:
    return -log_p_ETV.gather(-1, target_ET.unsqueeze(-1)).squeeze(-1)


def _entropy(log_p_ETV: Tensor) -> Tensor:
    return -(log_p_ETV.exp() * log_p_ETV).sum(-1)
