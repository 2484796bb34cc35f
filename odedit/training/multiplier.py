"""One lambda(delta, phi_e) for many edits: the dual variable of an editor whose weights are trained before any edit.

Where an edit is optimised by itself, `primal_dual` gives it a multiplier network of its own. Here the primal variable
is the editor's weights, shared by all training records, and so is the network. What it reads is the update that the
weights make of each record.

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
from odedit.objectives.common.multiplier import DUAL_DECAY, MultiplierNetwork, features, flat_input
from odedit.objectives.common.penalty import penalty_schedule
from odedit.objectives.common.sketch import CountSketch
from odedit.objectives.common.terms import Terms
from odedit.runtime.brief import brief


@dataclass(frozen=True)
class Dual:
    """The dual variable.

    Attributes:
        delta: The network's weights, axis 0 of length 1; empty before its first use.
        steps: Dual steps taken.
    """

    delta: EditParams = field(default_factory=dict)
    steps: int = 0

    __repr__ = brief


class SharedMultiplier:
    """Adds lambda times the penalty to the objective, and moves lambda; pure but for the sketch's hash."""

    def __init__(self, config: BaseConfig, max_steps: int, seed: int) -> None:
        self._config = config.invariance
        self._max_steps = max_steps
        self._seed = seed
        self._fixed = self._config.fixed
        self._sketch: CountSketch | None = None

    def schedule(self, step: int) -> float:
        """The share of the penalty that counts at a step."""
        return penalty_schedule(step, self._max_steps, self._config.warmup, self._config.ramp)

    def penalised(
        self, editor: object, params: EditParams, terms: Terms, dual: Dual, step: int, *, ascend: bool
    ) -> tuple[Tensor, Tensor, Dual]:
        """The objective with its penalty, lambda, and the dual variable after the step that is due.

        Args:
            params: phi_e of the E records, as the editor's weights make it.
            step: 0-based primal step.
            ascend: Whether a dual step is due: at the first forward after a primal step. It is taken before lambda is
                read, at the updated weights, as in `primal_dual`.

        Returns:
            `(E,)`, `(E,)` and the dual variable.
        """
        schedule = self.schedule(step)
        if schedule == 0 or self._fixed == 0:
            return terms.total, torch.zeros_like(terms.total), dual
        if self._fixed is not None:
            multiplier_E = torch.full_like(terms.total, self._fixed)
        else:
            context_EI = self._context(editor, params, terms)
            dual = dual if dual.delta else Dual(self._initial(context_EI))
            if ascend and self.schedule(step - 1) > 0:
                dual = self._ascended(dual, context_EI.detach(), terms.penalty.detach(), self.schedule(step - 1))
            multiplier_E = self._multiplier(dual.delta, context_EI)
        return terms.total + schedule * multiplier_E * terms.penalty, schedule * multiplier_E.detach(), dual

    def _context(self, editor: object, params: EditParams, terms: Terms) -> Tensor:
        """What lambda reads: each record's change of the weights, as sketch or flat, the risks, and every |g|."""
        assert isinstance(editor, Mergeable)
        num_edits = terms.total.shape[0]
        each = [editor.merged({name: value[e : e + 1] for name, value in params.items()}) for e in range(num_edits)]
        change = {site: torch.stack([one[site] for one in each]) for site in each[0]}
        if self._config.multiplier.input == "flat":
            phi_EP = flat_input(change)
        else:
            if self._sketch is None:
                sizes = {site: value[0].numel() for site, value in change.items()}
                self._sketch = CountSketch(sizes, self._config.multiplier.sketch_dim, self._seed)
            phi_EP = self._sketch(change)
        return features(phi_EP, *terms.multiplier_inputs())

    def _initial(self, context_EI: Tensor) -> EditParams:
        return MultiplierNetwork.init(self._config.multiplier, context_EI.shape[1], 1, self._seed, context_EI.device)

    def _multiplier(self, delta: EditParams, context_EI: Tensor) -> Tensor:
        shared = {name: value.expand(context_EI.shape[0], *value.shape[1:]) for name, value in delta.items()}
        return MultiplierNetwork.apply(self._config.multiplier, shared, context_EI)

    def _ascended(self, dual: Dual, context_EI: Tensor, penalty_E: Tensor, weight: float) -> Dual:
        """`delta <- delta + gamma_2 * grad_delta G`, G averaged over the records."""
        with torch.enable_grad():
            # Sorted: a state that was read back has them in another order, and sums of another order end in other bits.
            leaves = {name: dual.delta[name].detach().requires_grad_() for name in sorted(dual.delta)}
            gain = (weight * self._multiplier(leaves, context_EI) * penalty_E).mean()
            gradients = torch.autograd.grad(gain, list(leaves.values()))
        rate = torch.as_tensor(self._config.dual_rate, device=penalty_E.device)
        if self._config.dual_schedule == "adaptive":
            norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
            decayed = rate / (norm.clamp_min(1e-30) * (dual.steps + 1) ** DUAL_DECAY)
            rate = torch.where(norm > 0, decayed, torch.zeros_like(norm))
        delta = {
            name: (leaves[name] + rate * gradient).detach().requires_grad_()
            for name, gradient in zip(leaves, gradients, strict=True)
        }
        return Dual(delta, dual.steps + 1)
