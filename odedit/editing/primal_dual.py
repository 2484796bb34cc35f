"""The optimiser of edits: descent on phi_e, ascent on delta (arXiv 2601.19700, eq. 11-13).

Every edit of a batch has its own moments, step count, clipping and multiplier network, so its result is that of the
edit alone.

The dual step follows the primal step, at the updated phi_e. It is taken at the start of the next call, with the penalty
of the next forward: the same values without a second forward. With `multiplier.gradient_at: old`, as in the public
IRM-TV code, both steps are taken at the phi_e before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from odedit.editors.base import Editor, OptimizerSettings
from odedit.inputs.batch import EditParams, stack_params
from odedit.objectives.base import BaseConfig
from odedit.objectives.common import dual_step
from odedit.objectives.common.multiplier import DUAL_DECAY, MultiplierNetwork
from odedit.objectives.common.penalty import penalty_schedule
from odedit.objectives.common.terms import Terms
from odedit.runtime.brief import brief

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_LARGE_VALUES = 2**18
"""Values of one edit's tensor from which edits are moved in place, one after another."""


@dataclass(frozen=True)
class State:
    """State of the optimiser for E edits.

    Attributes:
        steps_E: Primal steps taken.
        dual_steps_E: Dual steps taken.
        dual_weight_E: Weight of the penalty in the last primal step; a dual step follows unless it was 0.
        moments: First and second moments by tensor name; empty for SGD.
        delta: Weights of the multiplier networks; empty unless lambda is learned.
    """

    steps_E: Tensor
    dual_steps_E: Tensor
    dual_weight_E: Tensor
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    delta: EditParams = field(default_factory=dict)

    __repr__ = brief

    def take(self, edits: Tensor) -> State:
        """State of the edits in these rows."""
        return replace(
            self,
            steps_E=self.steps_E[edits],
            dual_steps_E=self.dual_steps_E[edits],
            dual_weight_E=self.dual_weight_E[edits],
            moments={name: (first[edits], second[edits]) for name, (first, second) in self.moments.items()},
            delta={name: value[edits].detach().requires_grad_() for name, value in self.delta.items()},
        )

    def copy_(self, other: State) -> None:
        """Copies the values of a state of the same edits into this one's tensors."""
        for name in ("steps_E", "dual_steps_E", "dual_weight_E"):
            getattr(self, name).copy_(getattr(other, name))
        for name, pair in self.moments.items():
            for moment, other_moment in zip(pair, other.moments[name], strict=True):
                moment.copy_(other_moment)
        for name, value in self.delta.items():
            value.copy_(other.delta[name])


class PrimalDual:
    """Primal and dual steps of E edits. `descend` may overwrite the parameters and the state that it is given."""

    def __init__(
        self, editor: Editor, config: BaseConfig, max_steps: int, seed: int = 0, delta: EditParams | None = None
    ) -> None:
        """
        Args:
            delta: Weights that every edit's network starts from, axis 0 of length 1; None or {}: drawn by the seed.
        """
        self._editor = editor
        self._config = config.invariance
        self._seed, self._first_delta = seed, delta or {}
        self._fixed = self._config.fixed
        config.check(editor)
        warmup, ramp = self._config.warmup, self._config.ramp
        self._shares = [penalty_schedule(step, max_steps, warmup, ramp) for step in range(max_steps + 1)]
        self._schedule = torch.tensor(self._shares)

    def init(self, params: EditParams) -> State:
        """State before the first step of edits that start at `params`."""
        first = next(iter(params.values()))
        steps = torch.zeros(first.shape[0], dtype=torch.long, device=first.device)
        moments = {}
        if self._editor.optimizer.kind != "sgd":
            moments = {
                name: (torch.zeros_like(value), torch.zeros_like(value))
                for name, value in params.items()
                if name not in self._editor.frozen
            }
        return State(steps, steps.clone(), torch.zeros(len(steps), device=steps.device), moments)

    def joined(self, state: State, params: EditParams) -> State:
        """State extended by new edits, whose phi_0 is `params`."""
        new = self.init(params)
        delta = {}
        if state.delta:
            num_new, width = len(new.steps_E), state.delta["weight_0"].shape[1]
            first = self._new_delta(width, num_new, new.steps_E.device)
            delta = {
                name: torch.cat([value, first[name]]).detach().requires_grad_() for name, value in state.delta.items()
            }
        return State(
            steps_E=torch.cat([state.steps_E, new.steps_E]),
            dual_steps_E=torch.cat([state.dual_steps_E, new.dual_steps_E]),
            dual_weight_E=torch.cat([state.dual_weight_E, new.dual_weight_E]),
            moments=_joined(state.moments, new.moments),
            delta=delta,
        )

    @property
    def learns(self) -> bool:
        """Whether lambda is learned."""
        return self._fixed is None

    def is_penalised(self, steps: Iterable[int]) -> bool:
        """Whether lambda is learned and the penalty has weight at any of these step numbers."""
        return self.learns and any(self._shares[step] > 0 for step in steps)

    def weigh(
        self,
        params: EditParams,
        origin: EditParams,
        state: State,
        terms: Terms,
        active_E: Tensor,
        is_penalised: bool,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """The objective with its penalty, and the dual step of the active edits.

        Args:
            params: phi_e, the leaves that `terms` was computed from.
            origin: phi_0.
            active_E: True for edits that still move; the others keep their networks bit for bit.
            is_penalised: Result of `is_penalised`; True instead of False costs time and changes no value.

        Returns:
            The objective `(E,)`, the state, and `lambda` and `objective` of every edit as curves.
        """
        schedule_E = self._schedule_on(terms.total.device)[state.steps_E]
        context = self._context(params, origin, terms) if is_penalised else None
        if context is None:
            multiplier_E = torch.full_like(terms.total, self._fixed or 0.0)
        else:
            if not state.delta:
                state = replace(state, delta=self._init_delta(context))
            is_before = self._config.multiplier.gradient_at == "old"
            detached = context.detach(), terms.penalty.detach(), active_E
            if not is_before:  # the step that belongs to the last primal step
                state = self._dual_step(state, *detached, state.dual_weight_E, state.steps_E - 1)
            multiplier_E = MultiplierNetwork.apply(self._config.multiplier, state.delta, context)
            if is_before:
                state = self._dual_step(state, *detached, schedule_E, state.steps_E)
        state = replace(state, dual_weight_E=torch.zeros_like(schedule_E) if context is None else schedule_E)
        objective_E = terms.total
        if context is not None or self._fixed:
            penalty_E = schedule_E * multiplier_E * terms.penalty
            objective_E = objective_E + torch.where(schedule_E > 0, penalty_E, 0.0)
        return objective_E, state, {"lambda": multiplier_E.detach() * schedule_E, "objective": objective_E.detach()}

    def descend(
        self, params: EditParams, state: State, objective_E: Tensor, active_E: Tensor | None
    ) -> tuple[EditParams, State]:
        """One primal step; edits that are not active keep parameters and moments bit for bit.

        Large parameters on a CPU, and their moments, are moved in place: memory for new ones would be several times
        theirs.

        Args:
            params: phi_e, the leaves that the objective was computed from.
            active_E: True for edits that still move; None: all.

        Returns:
            New parameters (leaves) and new state.
        """
        names = [name for name in params if name not in self._editor.frozen]
        gradients = torch.autograd.grad(objective_E.sum(), [params[name] for name in names], allow_unused=True)
        gradient_of = {
            name: torch.zeros_like(params[name]) if gradient is None else gradient
            for name, gradient in zip(names, gradients, strict=True)
        }
        taken_E = torch.ones_like(state.steps_E) if active_E is None else active_E.long()
        if _is_large(params, names):
            self._descend_in_place(params, state, gradient_of, active_E)
            return params, replace(state, steps_E=state.steps_E + taken_E)
        moved, moments = self._moved(params, gradient_of, state)
        params = params | {name: _where(active_E, moved[name], params[name]).requires_grad_() for name in names}
        moments = {
            name: (_where(active_E, first, state.moments[name][0]), _where(active_E, second, state.moments[name][1]))
            for name, (first, second) in moments.items()
        }
        return params, replace(state, steps_E=state.steps_E + taken_E, moments=moments)

    def _moved(
        self, params: EditParams, gradients: EditParams, state: State
    ) -> tuple[EditParams, dict[str, tuple[Tensor, Tensor]]]:
        """`primal_step` within the editor's constraint."""
        trained = {name: params[name] for name in gradients}
        moved, moments = primal_step(self._editor.optimizer, trained, gradients, state)
        return self._editor.constrain(params | moved), moments

    @torch.no_grad()
    def _descend_in_place(
        self, params: EditParams, state: State, gradients: EditParams, active_E: Tensor | None
    ) -> None:
        """Moves the active edits one after another, so that a step's intermediate results are those of one edit."""
        rows = range(len(state.steps_E)) if active_E is None else active_E.nonzero().flatten().tolist()
        for row in rows:
            own = slice(row, row + 1)
            one = {name: (first[own], second[own]) for name, (first, second) in state.moments.items()}
            moved, moments = self._moved(
                {name: value.detach()[own] for name, value in params.items()},
                {name: value[own] for name, value in gradients.items()},
                replace(state, steps_E=state.steps_E[own], moments=one),
            )
            for name in gradients:
                params[name].detach()[own].copy_(moved[name])
            for name, pair in moments.items():
                for target, value in zip(one[name], pair, strict=True):
                    target.copy_(value)

    def _schedule_on(self, device: torch.device) -> Tensor:
        if self._schedule.device != device:
            self._schedule = self._schedule.to(device)
        return self._schedule

    def _context(self, params: EditParams, origin: EditParams, terms: Terms) -> Tensor:
        trained = {name: value for name, value in params.items() if name not in self._editor.frozen}
        return dual_step.context(self._config.multiplier, trained, terms, self._seed, origin)

    def _init_delta(self, context_EI: Tensor) -> EditParams:
        num_edits, width = context_EI.shape
        return self._new_delta(width, num_edits, context_EI.device)

    def _new_delta(self, width: int, num_edits: int, device: torch.device) -> EditParams:
        drawn = MultiplierNetwork.init(self._config.multiplier, width, num_edits, self._seed, device)
        first = self._first_delta
        if any(name not in first or first[name].shape[1:] != value.shape[1:] for name, value in drawn.items()):
            return drawn  # flat weights of another number, such as those of WISE's next shard
        return {name: first[name].to(value).expand_as(value).clone().requires_grad_() for name, value in drawn.items()}

    def _dual_step(
        self, state: State, context_EI: Tensor, penalty_E: Tensor, active_E: Tensor, weight_E: Tensor, step_E: Tensor
    ) -> State:
        """The state after a dual step of the active edits whose penalty has weight.

        Args:
            weight_E: Weight of the penalty in the primal step that the dual step belongs to.
            step_E: Number of that primal step, from 0.
        """
        active_E = active_E & (weight_E > 0)
        multiplier_E = MultiplierNetwork.apply(self._config.multiplier, state.delta, context_EI)
        gain = (weight_E * multiplier_E * penalty_E).sum()
        count_E = state.dual_steps_E if self._config.multiplier.counted == "dual" else step_E
        decay_E = (count_E + 1).to(penalty_E) ** DUAL_DECAY
        ascended = dual_step.ascended(self._config, state.delta, gain, decay_E)
        delta = {name: _where(active_E, ascended[name], value).requires_grad_() for name, value in state.delta.items()}
        return replace(state, delta=delta, dual_steps_E=state.dual_steps_E + active_E.long())


def _is_large(params: EditParams, names: Sequence[str]) -> bool:
    """Whether one edit's tensors are so large that a loop over edits costs nothing."""
    return any(
        params[name].device.type == "cpu" and params[name].numel() >= _LARGE_VALUES * len(params[name])
        for name in names
    )


def primal_step(
    settings: OptimizerSettings, params: EditParams, gradients: EditParams, state: State
) -> tuple[EditParams, dict[str, tuple[Tensor, Tensor]]]:
    """One step of SGD, Adam or AdamW per edit, on tensors whose axis 0 is the edit.

    Returns:
        New tensors and new moments.
    """
    with torch.no_grad():
        if settings.clip_norm is not None:
            norm_E = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
            scale_E = (settings.clip_norm / norm_E.clamp_min(1e-12)).clamp_max(1.0)
            gradients = {name: g * _broadcast(scale_E, g) for name, g in gradients.items()}
        decay, rate = settings.weight_decay, settings.learning_rate
        if settings.kind == "sgd":
            # Two passes over memory: these parameters may be larger than all other tensors.
            decayed = {name: torch.add(gradients[name], p, alpha=decay) for name, p in params.items()}
            return {name: torch.sub(p, decayed[name], alpha=rate) for name, p in params.items()}, {}
        moved, moments = {}, {}
        count_E = (state.steps_E + 1).to(torch.float32)
        # Factors per edit are folded into the divisor: fewer passes over the weights.
        first_E, second_E = 1 - _BETAS[0] ** count_E, 1 - _BETAS[1] ** count_E
        scale_E, least_E = first_E / (rate * second_E.sqrt()), _EPSILON * first_E / rate
        for name, p in params.items():
            gradient, (first, second) = gradients[name], state.moments[name]
            if decay and settings.kind == "adam":
                gradient = torch.add(gradient, p, alpha=decay)
            first = torch.lerp(first, gradient, 1 - _BETAS[0])
            second = (_BETAS[1] * second).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            divisor = torch.addcmul(_broadcast(least_E, p), second.sqrt(), _broadcast(scale_E, p))
            kept = p * (1 - rate * decay) if decay and settings.kind == "adamw" else p
            moved[name] = torch.addcdiv(kept, first, divisor, value=-1)
            moments[name] = (first, second)
        return moved, moments


def _joined(
    old: Mapping[str, tuple[Tensor, Tensor]], new: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of old and new edits, padded as the parameters are."""
    first, second = (
        stack_params([{name: pair[order] for name, pair in moments.items()} for moments in (old, new)])
        for order in (0, 1)
    )
    return {name: (first[name], second[name]) for name in old}


def _broadcast(values_E: Tensor, like: Tensor) -> Tensor:
    return values_E.reshape(-1, *[1] * (like.dim() - 1))


def _where(active_E: Tensor | None, moved: Tensor, kept: Tensor) -> Tensor:
    moved, kept = moved.detach(), kept.detach()
    return moved if active_E is None else torch.where(_broadcast(active_E, moved), moved, kept)
