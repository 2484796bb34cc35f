"""NLL and KL of single tokens, their scale gradients (`odedit.risks.risks`), and the gradients of both in closed form.

The vocabulary is the widest axis, so that tensors of logits are bound by memory bandwidth. One buffer of that size
lasts from forward to backward: log-probabilities overwrite the logits, and the gradient overwrites them if they are
not needed again. All other values are computed for a few rows at a time, which fit the processor's cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from odedit.runtime.budgets import budgets

Direction = Literal["edited_first", "base_first"]

_DIFFERENTIABLE_ONCE = "risks are differentiable once; their scale gradient needs no create_graph."


class TokenRisk(ABC):
    """A risk of M tokens, computed from the edited model's log-probabilities, C rows at a time.

    `kept`, `(C, 3)`, has what `backward` needs from `forward` beside the log-probabilities, and figures to report.
    """

    num_tokens: int

    @abstractmethod
    def forward(self, log_p_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Value `(C,)`, scale gradient `(C,)` and `kept` of the tokens `rows`."""

    @abstractmethod
    def backward(
        self, log_p_CV: Tensor, rows: slice, kept_C3: Tensor, both_C1: Tensor, slope_C1: Tensor | None
    ) -> None:
        """Overwrites the log-probabilities with the gradient with respect to the logits.

        Args:
            both_C1: Sum of the gradients with respect to value and scale gradient.
            slope_C1: Gradient with respect to the scale gradient alone; None: 0.
        """


class NLL(TokenRisk):
    """NLL of the target. With u = log p:  d NLL / d z = p - y,  d g / d z = p - y + p (u + H).

    `kept` has H, the NLL without smoothing, and 1 where the target is the most likely token.

    Args:
        target_M: Token ids.
        smoothing: Share of the uniform distribution over the vocabulary in the target; g = value - H as before.
    """

    def __init__(self, target_M: Tensor, smoothing: float = 0.0) -> None:
        self._target_M1, self._smoothing, self.num_tokens = target_M.unsqueeze(-1), smoothing, len(target_M)

    def forward(self, log_p_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        target_C1 = self._target_M1[rows]
        entropy_C = -(log_p_CV.exp() * log_p_CV).sum(-1)
        nll_C1 = -log_p_CV.gather(-1, target_C1)
        value_C = nll_C1.squeeze(-1)
        if self._smoothing:
            value_C = (1 - self._smoothing) * value_C - self._smoothing * log_p_CV.mean(-1)
        is_first_C1 = (log_p_CV.argmax(-1, keepdim=True) == target_C1).to(nll_C1)
        return value_C, value_C - entropy_C, torch.cat([entropy_C.unsqueeze(-1), nll_C1, is_first_C1], dim=-1)

    def backward(
        self, log_p_CV: Tensor, rows: slice, kept_C3: Tensor, both_C1: Tensor, slope_C1: Tensor | None
    ) -> None:
        if slope_C1 is None:
            grad_CV = log_p_CV.exp_().mul_(both_C1)
        else:
            weight_CV = torch.addcmul(both_C1 + slope_C1 * kept_C3[:, :1], slope_C1, log_p_CV)
            grad_CV = log_p_CV.exp_().mul_(weight_CV)
        grad_CV.scatter_add_(1, self._target_M1[rows], -(1 - self._smoothing) * both_C1)
        if self._smoothing:
            grad_CV -= (self._smoothing / grad_CV.shape[-1]) * both_C1


class KL(TokenRisk):
    """Divergence from the unedited model's distribution q, a constant.

    `edited_first`, KL(p || q). With u = log p, r = u - log q, c = u + H, s = r - KL, and g = E_p[c s]:

        d KL / d z = p s,  d g / d z = p (c s + c + s - g).

    `base_first`, KL(q || p). With u = log p and c = u + H:

        d KL / d z = p - q,  g = - E_q[c],  d g / d z = p - q + p c.

    `kept` has H, KL and g.

    Raises:
        ValueError: Unknown direction.
    """

    def __init__(self, log_q_MV: Tensor, direction: Direction = "edited_first") -> None:
        if direction not in get_args(Direction):
            raise ValueError(f"direction: got {direction!r}, expected one of {', '.join(get_args(Direction))}.")
        self._log_q_MV, self._edited_first, self.num_tokens = log_q_MV, direction == "edited_first", len(log_q_MV)

    def forward(self, log_p_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        log_q_CV, p_CV = self._log_q_MV[rows], log_p_CV.exp()
        entropy_C1 = -(p_CV * log_p_CV).sum(-1, keepdim=True)
        # Centring first avoids cancellation for p close to q.
        centred_CV = log_p_CV + entropy_C1
        if self._edited_first:
            ratio_CV = log_p_CV - log_q_CV
            kl_C1 = (p_CV * ratio_CV).sum(-1, keepdim=True)
            slope_C1 = p_CV.mul_(centred_CV).mul_(ratio_CV.sub_(kl_C1)).sum(-1, keepdim=True)
        else:
            q_CV = log_q_CV.exp()
            kl_C1 = (q_CV * (log_q_CV - log_p_CV)).sum(-1, keepdim=True)
            # E_p[c] is 0; subtracting it in the same sum avoids cancellation for p close to q.
            slope_C1 = p_CV.sub_(q_CV).mul_(centred_CV).sum(-1, keepdim=True)
        return kl_C1.squeeze(-1), slope_C1.squeeze(-1), torch.cat([entropy_C1, kl_C1, slope_C1], dim=-1)

    def backward(
        self, log_p_CV: Tensor, rows: slice, kept_C3: Tensor, both_C1: Tensor, slope_C1: Tensor | None
    ) -> None:
        log_q_CV = self._log_q_MV[rows]
        entropy_C1, kl_C1, g_C1 = kept_C3.split(1, dim=-1)
        centred_CV = None if slope_C1 is None else log_p_CV + entropy_C1
        if not self._edited_first:
            weight_CV = both_C1 if centred_CV is None else centred_CV.mul_(slope_C1).add_(both_C1)
            log_p_CV.exp_().mul_(weight_CV).sub_(log_q_CV.exp().mul_(both_C1))
            return
        weight_CV = (log_p_CV - log_q_CV).sub_(kl_C1)
        if centred_CV is None:
            weight_CV.mul_(both_C1)
        else:
            slope_CV = centred_CV.mul_(weight_CV + 1.0).sub_(g_C1).mul_(slope_C1)
            weight_CV = slope_CV.addcmul_(weight_CV, both_C1)
        log_p_CV.exp_().mul_(weight_CV)


class Tokens(NamedTuple):
    """One risk of M tokens.

    Attributes:
        value: Risk, `(M,)`.
        scale_gradient: Derivative of the risk with respect to w, `(M,)`; differentiable like the value.
        kept: `TokenRisk.kept`, `(M, 3)`; constants.
    """

    value: Tensor
    scale_gradient: Tensor
    kept: Tensor


def token_risks(logits_MV: Tensor, kinds: Sequence[TokenRisk], once: bool = False) -> list[Tokens]:
    """Risks of consecutive rows of logits, one result per kind.

    Args:
        logits_MV: Rows of all kinds in order, float32 or float64; overwritten. The operation that made them must not
            save its output for backward; a matrix product does not.
        kinds: Risks, each with its number of rows.
        once: True when at most one backward follows: it then overwrites the buffer instead of copying it, and a second
            backward raises RuntimeError.
    """
    sizes = [kind.num_tokens for kind in kinds]
    columns = [column.split(sizes) for column in _Rows.apply(logits_MV, kinds, once)]
    return [Tokens(*column) for column in zip(*columns, strict=True)]


def kl_of_states(
    states_MD: Tensor,
    base_MD: Tensor,
    head: Callable[[Tensor], Tensor],
    at_once: int,
    direction: Direction = "edited_first",
    with_slope: bool = True,
) -> Tokens:
    """KL from final hidden states, `at_once` rows at a time, so that only their distributions are in memory.

    The gradient with respect to the states is computed in the forward and saved, so that backward computes no logits.

    Args:
        states_MD: States of the edited model.
        base_MD: States of the unedited model, constants. Where both are equal, KL is exactly 0.
        head: Function from states `(C, D)` to logits `(C, V)`, row by row, without trained weights.
        at_once: Largest number of rows C.
        direction: As in `odedit.risks.risks.locality`.
        with_slope: True when scale gradients are differentiable; False: constants.
    """
    return Tokens(*_OfStates.apply(states_MD, base_MD, head, at_once, direction, with_slope))


class _OfStates(torch.autograd.Function):
    """Autograd function of `kl_of_states`."""

    @staticmethod
    def forward(
        ctx: Any,
        states_MD: Tensor,
        base_MD: Tensor,
        head: Callable[[Tensor], Tensor],
        at_once: int,
        direction: Direction,
        with_slope: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, gradients = [], []
        num_parts = max(1, math.ceil(len(states_MD) / at_once))
        for states_CD, base_CD in zip(states_MD.chunk(num_parts), base_MD.chunk(num_parts), strict=True):
            kind = KL(head(base_CD).log_softmax(-1), direction)
            leaf_CD = states_CD.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                (part,) = token_risks(head(leaf_CD), [kind], once=not with_slope)
            if leaf_CD.requires_grad:
                ones_C = torch.ones_like(part.value)
                wanted = part[: 1 + with_slope]
                gradients.append(
                    [torch.autograd.grad(of_C, leaf_CD, ones_C, retain_graph=with_slope)[0] for of_C in wanted]
                )
            # Detached, so that they do not keep the logits in memory.
            tokens.append([column.detach() for column in part])
        ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*gradients, strict=True)))
        value_M, slope_M, kept_M3 = (torch.cat(parts) for parts in zip(*tokens, strict=True))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept_M3, *([] if with_slope else [slope_M]))
        return value_M, slope_M, kept_M3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(_DIFFERENTIABLE_ONCE)
        parts = [
            grad_M.unsqueeze(-1).to(kept_MD.dtype) * kept_MD
            for grad_M, kept_MD in zip(grads, ctx.saved_tensors, strict=False)
            if grad_M is not None
        ]
        return sum(parts[1:], start=parts[0]) if parts else None, None, None, None, None, None


class _Rows(torch.autograd.Function):
    """Autograd function of `token_risks`."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, kinds: Sequence[TokenRisk], once: bool) -> tuple[Tensor, Tensor, Tensor]:
        # Detached, because autograd refuses to overwrite an input, or copies it.
        buffer_MV = logits_MV.detach()
        empty = buffer_MV[:0, 0]
        columns = [(empty, empty, empty.new_zeros(0, 3))]
        for kind, at, rows in _parts(buffer_MV, kinds):
            columns.append(kind.forward(buffer_MV[at].copy_(buffer_MV[at].log_softmax(-1)), rows))
        value_M, slope_M, kept_M3 = (torch.cat(column) for column in zip(*columns, strict=True))
        ctx.save_for_backward(buffer_MV, kept_M3)
        ctx.kinds, ctx.once = kinds, once
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept_M3)
        return value_M, slope_M, kept_M3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        # torch's `once_differentiable` would silently drop a part of the second derivative.
        if torch.is_grad_enabled():
            raise RuntimeError(_DIFFERENTIABLE_ONCE)
        value_M, slope_M, _ = grads
        both_M = slope_M if value_M is None else value_M
        if both_M is None:
            return None, None, None
        if value_M is not None and slope_M is not None:
            both_M = value_M + slope_M
        log_p_MV, kept_M3 = ctx.saved_tensors
        grad_MV = log_p_MV if ctx.once else log_p_MV.clone()
        for kind, at, rows in _parts(grad_MV, ctx.kinds):
            slope_C1 = None if slope_M is None else slope_M[at].unsqueeze(-1)
            kind.backward(grad_MV[at], rows, kept_M3[at], both_M[at].unsqueeze(-1), slope_C1)
        return grad_MV, None, None


def _parts(logits_MV: Tensor, kinds: Sequence[TokenRisk]) -> Iterator[tuple[TokenRisk, slice, slice]]:
    """Chunks of rows of one kind: the kind, the rows' slice of all logits, and their slice of the kind's tokens."""
    size = max(1, budgets(logits_MV.device).risk_logits // logits_MV.shape[1])
    first = 0
    for kind in kinds:
        for start in range(0, kind.num_tokens, size):
            stop = min(start + size, kind.num_tokens)
            yield kind, slice(first + start, first + stop), slice(start, stop)
        first += kind.num_tokens
