"""One lambda(delta, phi_e) for many edits: the dual variable of an editor whose weights are trained before any edit.

`odedit.editing.primal_dual` has one multiplier network per edit. Here the primal variable is the editor's weights,
shared by all training records, and so is the network; its input is the change of weights made for each record.

References:
    arXiv 2601.19700, eq. 11-13.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from odedit.editors.base import Mergeable
from odedit.inputs.batch import EditParams
from odedit.objectives.base import BaseConfig
from odedit.objectives.common import dual_step
from odedit.objectives.common.multiplier import DUAL_DECAY, MultiplierNetwork
from odedit.objectives.common.penalty import penalty_schedule
from odedit.objectives.common.terms import Terms
from odedit.runtime.brief import brief


@dataclass(frozen=True)
class Dual:
    """The dual variable.

    Attributes:
        delta: Weights of the network, axis 0 of length 1; empty before the first use.
        steps: Dual steps taken.
    """

    delta: EditParams = field(default_factory=dict)
    steps: int = 0

    __repr__ = brief


class SharedMultiplier:
    """Adds lambda times the penalty to the objective, and takes dual steps; pure, the dual variable is passed."""

    def __init__(self, config: BaseConfig, max_steps: int, seed: int) -> None:
        self._config = config.invariance
        self._max_steps = max_steps
        self._seed = seed
        self._fixed = self._config.fixed

    def schedule(self, step: int) -> float:
        """Factor of the penalty at a step."""
        return penalty_schedule(step, self._max_steps, self._config.warmup, self._config.ramp)

    def penalised(
        self,
        editor: object,
        params: EditParams,
        terms: Terms,
        dual: Dual,
        step: int,
        *,
        is_first: bool = True,
        is_last: bool = True,
    ) -> tuple[Tensor, Tensor, Dual]:
        """The objective with its penalty, lambda, and the dual variable after its step, if any.

        The dual step that belongs to a primal step is taken at the first forward after it, before lambda is computed;
        with `multiplier.gradient_at: old` at its last forward, after lambda is computed. See `primal_dual`.

        Args:
            params: phi_e of the E records, as the editor's weights make it.
            step: Number of the primal step, from 0.
            is_first, is_last: True at the first and at the last forward of the primal step, which are often the same.

        Returns:
            `(E,)`, `(E,)` and the dual variable.
        """
        schedule = self.schedule(step)
        if schedule == 0 or self._fixed == 0:
            return terms.total, torch.zeros_like(terms.total), dual
        if self._fixed is not None:
            multiplier_E = torch.full_like(terms.total, self._fixed)
        else:
            context_EI = dual_step.context(self._config.multiplier, _changes(editor, params), terms, self._seed)
            dual = dual if dual.delta else Dual(self._initial(context_EI))
            is_before = self._config.multiplier.gradient_at == "old"
            if is_first and not is_before:
                dual = self._ascended(dual, context_EI.detach(), terms.penalty.detach(), step - 1)
            multiplier_E = self._multiplier(dual.delta, context_EI)
            if is_last and is_before:
                dual = self._ascended(dual, context_EI.detach(), terms.penalty.detach(), step)
        return terms.total + schedule * multiplier_E * terms.penalty, schedule * multiplier_E.detach(), dual

    def _initial(self, context_EI: Tensor) -> EditParams:
        return MultiplierNetwork.init(self._config.multiplier, context_EI.shape[1], 1, self._seed, context_EI.device)

    def _multiplier(self, delta: EditParams, context_EI: Tensor) -> Tensor:
        shared = {name: value.expand(context_EI.shape[0], *value.shape[1:]) for name, value in delta.items()}
        return MultiplierNetwork.apply(self._config.multiplier, shared, context_EI)

    def _ascended(self, dual: Dual, context_EI: Tensor, penalty_E: Tensor, step: int) -> Dual:
        """The dual variable after the step that belongs to a primal step; the gain is the mean over the records."""
        weight = self.schedule(step)
        if weight == 0:
            return dual
        with torch.enable_grad():
            # Sorted: a state read from a file has another order, and sums in another order differ in the last bits.
            leaves = {name: dual.delta[name].detach().requires_grad_() for name in sorted(dual.delta)}
            gain = (weight * self._multiplier(leaves, context_EI) * penalty_E).mean()
            count = dual.steps if self._config.multiplier.counted == "dual" else step
            decay_N = torch.tensor([(count + 1) ** DUAL_DECAY], device=penalty_E.device)
            delta = dual_step.ascended(self._config, leaves, gain, decay_N)
        return Dual({name: value.requires_grad_() for name, value in delta.items()}, dual.steps + 1)


def _changes(editor: object, params: EditParams) -> EditParams:
    """Change of weights that each record's phi_e stands for, by site."""
    assert isinstance(editor, Mergeable)
    num_edits = len(next(iter(params.values())))
    each = [editor.merged({name: value[e : e + 1] for name, value in params.items()}) for e in range(num_edits)]
    return {site: torch.stack([changes[site] for changes in each]) for site in each[0]}
