"""The only inner loop: independent edits, optimised together, each stopped by its own rule.

A finished edit costs as much per step as one that moves. So as soon as enough have finished, they leave the batch, and
edits that wait take their places.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.editing.curves import EditResult, Progress
from odedit.editing.primal_dual import PrimalDual, State
from odedit.editing.width import is_small, width_like_native
from odedit.editors.base import Editor, Trace
from odedit.inputs.batch import EditBatch, EditParams, stack_params
from odedit.objectives.base import Objective
from odedit.objectives.common.terms import Terms, Unedited
from odedit.runtime import cuda_graphs
from odedit.runtime.brief import brief
from odedit.runtime.stages import stage, unmeasured
from odedit.settings import Settings

_WORTH_RECORDING = 4
"""Steps to come for which a step is recorded: that costs about as much as one step whose kernels start one by one."""
_FULL_ENOUGH = 0.75
"""Share of moving edits below which the finished ones leave the batch: copying the rest costs about one step."""


@dataclass(frozen=True)
class Stopping(Settings):
    """When an edit stops moving.

    Attributes:
        max_steps: Bound of the loop; None: the editor's published number.
        worst_token_nll: Stops when the least likely target token has come below this NLL: the mean would hide an
            unlearned first token behind a confident second one. None: the editor's own rule.
    """

    max_steps: Annotated[int, Ge(0)] | None = None
    worst_token_nll: Annotated[float, Gt(0)] | None = None


def edit(
    backbone: Backbone,
    editor: Editor,
    objective: Objective,
    batch: EditBatch,
    stopping: Stopping = Stopping(),
    seed: int = 0,
    width: int | None = None,
    results_on: torch.device | str = "cpu",
) -> list[EditResult]:
    """Optimises the E edits of `batch`, each as if it were alone.

    Args:
        batch: The supervision batch of `encode_requests`.
        seed: Of the multiplier network and the sketch; the same for every edit.
        width: How many edits move together at most; fewer where they would take more memory than all of them under
            the base editor's own loss, see `odedit.editing.width`. None: no further bound.
        results_on: Where the finished edits go. On the host those of a long batch do not crowd out the ones that move;
            on the model's own device there is nothing to copy for who scores them next.

    Returns:
        E results, in order. An edit whose objective is not finite is returned with `error`, and does not disturb
        others.
    """
    started = time.perf_counter()
    run = _Run(backbone, editor, objective, batch, stopping, seed, width or batch.num_edits, results_on)
    while run.has_edits():
        run.step()
    seconds = (time.perf_counter() - started) / batch.num_edits
    return run.results(batch.edit_ids, seconds)


class _Weighed(NamedTuple):
    """What one forward of the edits in the batch has shown, on their device.

    Attributes:
        objective_E: What the primal step descends on.
        state: Of the optimiser, its dual step taken.
        active_E: Edits that move on.
        loss_E: The objective without penalty.
        table: A row for every name, `(rows, E)`: whether an edit is to stop for a reason, then its curves.
        names: Of the rows.
        trace: For `Editor.finished`.
    """

    objective_E: Tensor
    state: State
    active_E: Tensor
    loss_E: Tensor
    table: Tensor
    names: tuple[str, ...]
    trace: Trace


@dataclass(frozen=True)
class _Recording:
    """A step that can be started as a whole, and where it leaves what it shows."""

    names: tuple[str, ...]
    table: Tensor
    trace: Trace
    start: Callable[[], None] = lambda: None

    __repr__ = brief


class _Run:
    """The edits that move, those that wait, and what the others have become."""

    def __init__(
        self,
        backbone: Backbone,
        editor: Editor,
        objective: Objective,
        batch: EditBatch,
        stopping: Stopping,
        seed: int,
        width: int,
        results_on: torch.device | str,
    ) -> None:
        max_steps = editor.max_steps if stopping.max_steps is None or editor.max_steps == 0 else stopping.max_steps
        self._backbone, self._editor = backbone, editor
        self._stopping, self._max_steps = stopping, max_steps
        self._results_on = results_on
        self._objective = objective.for_one_gradient()
        self._optimizer = PrimalDual(editor, objective.config, max(max_steps, 1), seed)
        self._progress = Progress(batch.num_edits)
        self._finished: dict[int, EditParams] = {}
        # Of all edits. What follows is of those in the batch, axis 0 in the order of `progress.members`.
        # One more forward sees where the last step led.
        self._all = batch.select(objective.slots_within(objective.slots(editor, batch), max_steps + 1))
        with stage("edit: prefix"), torch.no_grad():
            self._all_prefix = backbone.prefix(
                self._all, *editor.sites, positionwise=editor.positionwise, read_EKT=objective.read(self._all)
            )
        self._width = min(width, width_like_native(backbone, editor, objective, batch, self._all_prefix))
        # One product with a hypernetwork for all edits; what it makes is the edits themselves.
        self._made = {} if max_steps > 0 else self._init(self._all, self._all_prefix)
        self._origin: EditParams = {}
        self._params: EditParams = {}
        self._state: State | None = None
        self._previous_E = torch.empty(0, device=batch.tokens_EKS.device)
        self._base_EKTD: Tensor | None = None
        self._weight_EK: Tensor | None = None
        self._unedited: Unedited | None = None
        # Of `_all`'s sequences, of which the batch may show some at a time.
        self._present_EK = torch.empty(0, 0)
        # A step of a batch is recorded after a first one like it.
        self._is_worth_recording, self._steps_alike = False, 0
        self._recording: _Recording | None = None
        self._admit()

    def _init(self, batch: EditBatch, prefix: Prefix) -> EditParams:
        with stage("edit: start"):
            return _detached(self._editor.init(self._backbone, batch, prefix))

    def has_edits(self) -> bool:
        return bool(self._progress.members)

    def step(self) -> None:
        """One forward of all edits in the batch, and one step of those that move on."""
        trace = self._replayed() if self._is_recorded() else self._moved()
        if sum(self._progress.is_active) <= _FULL_ENOUGH * len(self._progress.members):
            self._let_go(trace)
            del trace  # it may hold all that the last step made
            self._admit()

    def _moved(self) -> Trace:
        assert self._state is not None
        # Recorded steps are all alike; while no penalty counts, its part in them is 0.
        taken = [self._progress.steps[member] for member in self._progress.members]
        is_penalised = self._optimizer.learns if self._is_worth_recording else self._optimizer.is_penalised(taken)
        weighed = self._weigh(self._params, self._state, is_penalised)
        self._state, self._active_E, self._previous_E = weighed.state, weighed.active_E, weighed.loss_E
        self._progress.take_in(weighed.names, weighed.table)
        # Of the last step nobody takes a gradient.
        if any(self._progress.is_active):
            all_move = all(self._progress.is_active)
            self._params, self._state = self._descend(self._params, weighed, None if all_move else weighed.active_E)
        self._steps_alike += 1
        return weighed.trace

    def _weigh(self, params: EditParams, state: State, is_penalised: bool) -> _Weighed:
        with stage("edit: forward"):
            prefix, unedited = self._seen(state.steps_E)
            with self._editor.applied(self._backbone, params, self._batch) as trace:
                hidden = self._backbone.suffix(prefix, self._objective.read(self._batch))
        with stage("edit: risks"):
            terms = self._objective(self._backbone, self._editor, params, trace, self._batch, hidden, unedited)
            stops = self._stops(terms, trace, state.steps_E)
            active_E = self._active_E & ~torch.stack(list(stops.values())).any(dim=0)
            objective_E, state, shown = self._optimizer.weigh(
                params, self._origin, state, terms, active_E, is_penalised
            )
            columns = {
                **stops,
                **terms.risks,
                "penalty": terms.penalty,
                "worst_nll": terms.worst_nll,
                **{f"g_{name}": gradient for name, gradient in terms.scale_gradients.items()},
                **shown,
            }
            table = torch.stack([value.detach().float() for value in columns.values()])
        return _Weighed(objective_E, state, active_E, terms.total.detach(), table, tuple(columns), trace)

    def _unedited_states(self, batch: EditBatch, num_at_once: int) -> Tensor:
        """Final states `(E, K, T, D)`, of as many sequences at a time as a step has.

        Rounding depends on that, and phi_0 shall differ in nothing; and no more is held at a time than in a step.
        """
        num_slots, parts = len(batch.slots), []
        for first in range(0, num_slots, num_at_once):
            columns_K = torch.arange(first, first + num_at_once, device=self._device) % num_slots
            prefix = (
                self._prefix if num_slots == num_at_once else self._prefix.pick(columns_K.expand(batch.num_edits, -1))
            )
            parts.append(self._backbone.suffix(prefix, batch.predict_EKT.index_select(1, columns_K)))
        return torch.cat(parts, dim=1)[:, :num_slots]

    def _seen(self, steps_E: Tensor) -> tuple[Prefix, Unedited | None]:
        """What the edits are shown in this step, and what it is compared with."""
        columns_EK = self._objective.columns_in_turn(self._all.slots, self._present_EK, steps_E)
        if columns_EK is None:
            return self._prefix, self._unedited
        assert self._base_EKTD is not None and self._weight_EK is not None, "whoever takes turns compares and weighs"
        # Negatives differ in their picture alone: tokens and masks are those of the first.
        base_EKTD = self._base_EKTD.gather(1, columns_EK[:, :, None, None].expand(-1, -1, *self._base_EKTD.shape[2:]))
        weight_EK = self._weight_EK.gather(1, columns_EK)
        unedited = self._objective.unedited(self._backbone, self._batch, base_EKTD, weight_EK)
        return self._prefix.pick(columns_EK), unedited

    def _stops(self, terms: Terms, trace: Trace, steps_E: Tensor) -> dict[str, Tensor]:
        """`(E,)` by reason, the weightiest first."""
        loss_E = terms.total.detach()
        finite_E = torch.isfinite(loss_E) & torch.isfinite(terms.penalty.detach())
        if self._stopping.worst_token_nll is not None:
            good = {"worst_token_nll": terms.worst_trained_nll <= self._stopping.worst_token_nll}
        else:
            good = {"converged": self._editor.converged(loss_E, self._previous_E, terms.all_right, trace)}
        return {"failed": ~finite_E, **good, "max_steps": steps_E >= self._max_steps}

    def _descend(self, params: EditParams, weighed: _Weighed, active_E: Tensor | None) -> tuple[EditParams, State]:
        with stage("edit: backward and update"):
            return self._optimizer.descend(params, weighed.state, weighed.objective_E, active_E)

    def _is_recorded(self) -> bool:
        """Whether the next step can be started as a whole; after the first of a batch, records it."""
        if self._recording is None and self._is_worth_recording and self._steps_alike:
            left = self._max_steps - min(self._progress.steps[member] for member in self._progress.members)
            if left >= _WORTH_RECORDING:
                self._record()
                self._is_worth_recording = self._recording is not None
        return self._recording is not None

    def _record(self) -> None:
        """Records a step that leaves what it moves where it was."""
        assert self._state is not None
        state = self._state
        shown: list[_Recording] = []

        def step() -> None:
            # Leaves of this step alone: autograd remembers on which stream a leaf was first used.
            params = _alike(self._params)
            weighed = self._weigh(params, replace(state, delta=_alike(state.delta)), self._optimizer.learns)
            moved, new = self._descend(params, weighed, weighed.active_E)
            shown[:] = [_Recording(weighed.names, weighed.table, weighed.trace)]
            with torch.no_grad():
                for name, value in moved.items():
                    self._params[name].copy_(value)
                state.copy_(new)
                self._active_E.copy_(weighed.active_E)
                self._previous_E.copy_(weighed.loss_E)

        with unmeasured():
            start = cuda_graphs.recorded(step, self._device)
        self._recording = None if start is None else replace(shown[0], start=start)

    def _replayed(self) -> Trace:
        assert self._recording is not None
        with stage("edit: recorded steps"):
            self._recording.start()
            self._progress.take_in(self._recording.names, self._recording.table)
        return self._recording.trace

    def _let_go(self, trace: Trace) -> None:
        """Takes the finished edits out of the batch."""
        assert self._state is not None
        progress = self._progress
        finished = self._editor.finished(_detached(self._params), trace, self._batch)
        for row, member in enumerate(progress.members):
            if not progress.is_active[row]:
                self._finished[member] = {
                    name: value[row : row + 1].to(self._results_on, copy=True) for name, value in finished.items()
                }
        stay = torch.tensor([row for row, active in enumerate(progress.is_active) if active], device=self._device)
        stay = stay.long()
        self._base_EKTD = None if self._base_EKTD is None else self._base_EKTD[stay]
        self._weight_EK = None if self._weight_EK is None else self._weight_EK[stay]
        progress.keep_active()
        self._origin = {name: value[stay] for name, value in self._origin.items()}
        self._params = {name: value.detach()[stay] for name, value in self._params.items()}
        self._state = self._state.take(stay)
        self._previous_E = self._previous_E[stay]

    def _admit(self) -> None:
        """Fills the places that are free with edits that wait, and gathers what belongs to the batch."""
        progress = self._progress
        staying = len(progress.members)
        progress.admit(self._width - staying)
        self._recording, self._steps_alike = None, 0
        if not progress.members:
            return
        members = torch.tensor(progress.members, device=self._device)
        # Where all edits move together there is nothing to copy.
        if progress.members == list(range(self._all.num_edits)):
            batch, self._prefix = self._all, self._all_prefix
        else:
            batch, self._prefix = self._all.take(members), self._all_prefix.take(members)
        at_once = self._objective.slots_at_once(batch.slots)
        self._present_EK = batch.present_EK
        self._batch = batch if at_once == batch.slots else batch.select(at_once)
        if self._objective.compares:
            with stage("edit: prefix"), torch.no_grad():
                if len(members) > staying or self._base_EKTD is None:
                    self._base_EKTD = self._unedited_states(batch, len(at_once))
                    self._weight_EK = self._objective.weights_of_locality(self._backbone, batch, self._base_EKTD)
                if self._batch is batch:
                    self._unedited = self._objective.unedited(self._backbone, batch, self._base_EKTD, self._weight_EK)
        if len(members) > staying:
            rows = members[staying:]
            new = (
                {name: value[rows] for name, value in self._made.items()}
                if self._made
                else self._init(self._all.take(rows), self._all_prefix.take(rows))
            )
            if staying and self._state is not None:
                self._origin, self._params = (stack_params([old, new]) for old in (self._origin, self._params))
                self._state = self._optimizer.joined(self._state, new)
            else:
                self._origin = self._params = new
                self._state = self._optimizer.init(new)
        self._active_E = torch.ones(len(members), dtype=torch.bool, device=self._device)
        self._previous_E = torch.cat(
            [self._previous_E, self._previous_E.new_full((len(members) - staying,), torch.inf)]
        )
        self._params = _leaves(self._params, self._editor.frozen if self._max_steps > 0 else self._params)
        self._is_worth_recording = (
            self._max_steps > 0
            and cuda_graphs.are_used(self._device)
            and is_small(self._backbone, self._editor, self._objective, self._batch, self._prefix, self._params)
        )

    @property
    def _device(self) -> torch.device:
        return self._all.tokens_EKS.device

    def results(self, edit_ids: tuple[str, ...], seconds: float) -> list[EditResult]:
        return self._progress.results(edit_ids, self._finished, seconds)


def _detached(params: EditParams) -> EditParams:
    return {name: value.detach() for name, value in params.items()}


def _leaves(params: EditParams, frozen: Container[str]) -> EditParams:
    """Copies that gradients are taken with respect to, but for those that are frozen."""
    return {name: value.detach().clone().requires_grad_(name not in frozen) for name, value in params.items()}


def _alike(params: EditParams) -> EditParams:
    """Leaves on the same memory."""
    return {name: value.detach().requires_grad_(value.requires_grad) for name, value in params.items()}
