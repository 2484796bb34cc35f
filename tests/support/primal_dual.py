"""One step of the optimiser, without the loop around it."""

from __future__ import annotations

from torch import Tensor

from odedit.editing.primal_dual import PrimalDual, State
from odedit.inputs.batch import EditParams
from odedit.objectives.common.terms import Terms


def step(
    optimizer: PrimalDual, params: EditParams, origin: EditParams, state: State, terms: Terms, active_E: Tensor
) -> tuple[EditParams, State, dict[str, Tensor]]:
    """`weigh` and `descend`: new parameters, new state, and what `weigh` shows."""
    is_penalised = optimizer.is_penalised(state.steps_E.tolist())
    objective_E, state, shown = optimizer.weigh(params, origin, state, terms, active_E, is_penalised)
    return *optimizer.descend(params, state, objective_E, active_E), shown
