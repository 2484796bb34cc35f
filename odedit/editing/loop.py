"""The inner loop: independent edits, optimised together, each with its own stop.

A finished edit costs as much per step as an active one. So once enough edits have finished, they leave the batch, and
waiting edits enter it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
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
"""Remaining steps from which recording a CUDA graph pays: it costs about as much as one step without a graph."""
_FULL_ENOUGH = 0.75
"""Share of active edits below which finished ones leave the batch: copying the active ones costs about one step."""


@dataclass(frozen=True)
class Stopping(Settings):
    """When an edit stops moving.

    Attributes:
        max_steps: Largest number of steps; null: the editor's published number.
        worst_token_nll: NLL that the least likely target token must reach to stop (a mean could hide an unlearned
            token); null: the editor's own rule.
    """

    max_steps: Annotated[int, Ge(0)] | None = None
    worst_token_nll: Annotated[float, Gt(0)] | None = None


@dataclass(frozen=True)
class Start:
    """Where edits start that go on from earlier ones.

    Attributes:
        params: Values of phi_0 by name, axis 0 of length 1, instead of those of `Editor.init`.
        delta: Weights of the multiplier network, axis 0 of length 1, if they fit its input; {}: drawn by the seed.
    """

    params: EditParams = field(default_factory=dict)
    delta: EditParams = field(default_factory=dict)

    __repr__ = brief


def edit(
    backbone: Backbone,
    editor: Editor,
    objective: Objective,
    batch: EditBatch,
    stopping: Stopping = Stopping(),
    seed: int = 0,
    width: int | None = None,
    results_on: torch.device | str = "cpu",
    start: Start | None = None,
) -> list[EditResult]:
    """Optimises the E edits of `batch` independently of each other.

    Args:
        batch: Supervision batch of `encode_requests`.
        seed: Seed of the multiplier network and the sketch, the same for every edit.
        width: Largest number of edits that move together; `odedit.editing.width` may lower it, so that they need no
            more memory than all edits under the base editor's own loss. None: no further bound.
        results_on: Device of the finished edits. On the CPU they take no memory from the active ones; on the model's
            device they need not be copied to be scored.
        start: Where all edits start; None: as `Editor.init` and the seed say. With a start, results have `delta`.

    Returns:
        E results, in order. An edit whose objective is not finite is returned with `error`; it does not affect others.
    """
    started = time.perf_counter()
    run = _Run(backbone, editor, objective, batch, stopping, seed, width or batch.num_edits, results_on, start)
    while run.has_edits():
        run.step()
    seconds = (time.perf_counter() - started) / batch.num_edits
    return run.results(batch.edit_ids, seconds)


class _Weighed(NamedTuple):
    """Results of one forward of the batch, on its device.

    Attributes:
        objective_E: Objective of the primal step, with penalty.
        state: State of the optimiser after its dual step.
        active_E: True for edits that do not stop here.
        loss_E: Objective without penalty.
        table: Stop flags by reason, then curves, `(rows, E)`.
        names: Names of the table's rows.
        trace: Values recorded by the editor's hooks, for `Editor.finished`.
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
    """A step recorded as a CUDA graph, and the tensors that it writes its results to."""

    names: tuple[str, ...]
    table: Tensor
    trace: Trace
    start: Callable[[], None] = lambda: None

    __repr__ = brief


class _Run:
    """Active, waiting and finished edits of one call of `edit`.

    Tensors named `_all` cover all edits; the others cover the batch, axis 0 in the order of `_progress.members`.
    """

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
        start: Start | None = None,
    ) -> None:
        max_steps = editor.max_steps if stopping.max_steps is None or editor.max_steps == 0 else stopping.max_steps
        self._backbone, self._editor = backbone, editor
        self._stopping, self._max_steps = stopping, max_steps
        self._results_on = results_on
        self._start = start
        self._objective = objective.for_one_gradient()
        delta = {} if start is None else start.delta
        self._optimizer = PrimalDual(editor, objective.config, max(max_steps, 1), seed, delta)
        self._progress = Progress(batch.num_edits)
        self._finished: dict[int, EditParams] = {}
        self._deltas: dict[int, EditParams] = {}
        # One more forward than steps: it evaluates the result of the last step.
        self._all = batch.select(objective.slots_within(objective.slots(editor, batch), max_steps + 1))
        with stage("edit: prefix"), torch.no_grad():
            self._all_prefix = backbone.prefix(
                self._all, *editor.sites, positionwise=editor.positionwise, read_EKT=objective.read(self._all)
            )
        self._width = min(width, width_like_native(backbone, editor, objective, batch, self._all_prefix))
        # Without steps, phi_0 is the edit: one product with the hypernetwork for all edits.
        self._initial = {} if max_steps > 0 else self._init(self._all, self._all_prefix)
        self._origin: EditParams = {}
        self._params: EditParams = {}
        self._state: State | None = None
        self._previous_E = torch.empty(0, device=batch.tokens_EKS.device)
        self._base_EKTD: Tensor | None = None
        self._weight_EK: Tensor | None = None
        self._unedited: Unedited | None = None
        # Presence of all slots of `_all`, without negatives of weight 0: a step reads only some negatives, in turn.
        self._present_EK = torch.empty(0, 0)
        # The first step after a change of the batch runs without a graph; the second is recorded.
        self._is_worth_recording, self._steps_of_batch = False, 0
        self._recording: _Recording | None = None
        self._admit()

    def _init(self, batch: EditBatch, prefix: Prefix) -> EditParams:
        with stage("edit: start"):
            initial = _detached(self._editor.init(self._backbone, batch, prefix))
        given = {} if self._start is None else self._start.params
        return {
            name: given[name].to(value).expand_as(value).clone() if name in given else value
            for name, value in initial.items()
        }

    def has_edits(self) -> bool:
        return bool(self._progress.members)

    def step(self) -> None:
        """One forward of all edits in the batch, and one step of the active ones."""
        trace = self._replayed() if self._is_recorded() else self._stepped()
        if sum(self._progress.is_active) <= _FULL_ENOUGH * len(self._progress.members):
            self._remove_finished(trace)
            del trace  # It may hold all activations of the last step.
            self._admit()

    def _stepped(self) -> Trace:
        assert self._state is not None
        # A graph is the same for all steps: it computes the penalty during the warm-up too, with weight 0.
        taken = [self._progress.steps[member] for member in self._progress.members]
        is_penalised = self._optimizer.learns if self._is_worth_recording else self._optimizer.is_penalised(taken)
        weighed = self._weigh(self._params, self._state, is_penalised)
        self._state, self._active_E, self._previous_E = weighed.state, weighed.active_E, weighed.loss_E
        self._progress.add_step(weighed.names, weighed.table)
        # The last forward needs no gradient.
        if any(self._progress.is_active):
            all_move = all(self._progress.is_active)
            self._params, self._state = self._descend(self._params, weighed, None if all_move else weighed.active_E)
        self._steps_of_batch += 1
        return weighed.trace

    def _weigh(self, params: EditParams, state: State, is_penalised: bool) -> _Weighed:
        with stage("edit: forward"):
            prefix, unedited = self._in_turn(state.steps_E)
            with self._editor.applied(self._backbone, params, self._batch) as trace:
                hidden = self._backbone.suffix(prefix, self._objective.read(self._batch))
        with stage("edit: risks"):
            terms = self._objective(self._backbone, self._editor, params, trace, self._batch, hidden, unedited)
            stops = self._stops(terms, trace, state.steps_E)
            active_E = self._active_E & ~torch.stack(list(stops.values())).any(dim=0)
            objective_E, state, penalty_curves = self._optimizer.weigh(
                params, self._origin, state, terms, active_E, is_penalised
            )
            columns = {
                **stops,
                **terms.risks,
                "penalty": terms.penalty,
                "worst_nll": terms.worst_nll,
                **{f"g_{name}": gradient for name, gradient in terms.scale_gradients.items()},
                **penalty_curves,
            }
            table = torch.stack([value.detach().float() for value in columns.values()])
        return _Weighed(objective_E, state, active_E, terms.total.detach(), table, tuple(columns), trace)

    def _unedited_states(self, batch: EditBatch, num_at_once: int) -> Tensor:
        """Final states of the unedited model at the answers, `(E, K, T, D)`, `num_at_once` sequences at a time.

        `num_at_once` is the number of sequences of a step: rounding depends on it, and at phi_0 the edited and the
        unedited states must be equal bit for bit.
        """
        num_slots, parts = len(batch.slots), []
        for first in range(0, num_slots, num_at_once):
            columns_K = torch.arange(first, first + num_at_once, device=self._device) % num_slots
            prefix = (
                self._prefix if num_slots == num_at_once else self._prefix.pick(columns_K.expand(batch.num_edits, -1))
            )
            parts.append(self._backbone.suffix(prefix, batch.predict_EKT.index_select(1, columns_K)))
        return torch.cat(parts, dim=1)[:, :num_slots]

    def _in_turn(self, steps_E: Tensor) -> tuple[Prefix, Unedited | None]:
        """Prefix and unedited answers of the sequences that each edit reads in this step."""
        columns_EK = self._objective.columns_in_turn(self._all.slots, self._present_EK, steps_E)
        if columns_EK is None:
            return self._prefix, self._unedited
        assert self._base_EKTD is not None and self._weight_EK is not None, "needed to read negatives in turn"
        # Negatives differ only in their picture: they share tokens and masks.
        base_EKTD = self._base_EKTD.gather(1, columns_EK[:, :, None, None].expand(-1, -1, *self._base_EKTD.shape[2:]))
        weight_EK = self._weight_EK.gather(1, columns_EK)
        unedited = self._objective.unedited(self._backbone, self._batch, base_EKTD, weight_EK)
        return self._prefix.pick(columns_EK), unedited

    def _stops(self, terms: Terms, trace: Trace, steps_E: Tensor) -> dict[str, Tensor]:
        """True for edits that stop, `(E,)` by reason; the first reason of an edit is reported."""
        loss_E = terms.total.detach()
        finite_E = torch.isfinite(loss_E) & torch.isfinite(terms.penalty.detach())
        if self._stopping.worst_token_nll is not None:
            learned = {"worst_token_nll": terms.worst_trained_nll <= self._stopping.worst_token_nll}
        else:
            learned = {"converged": self._editor.converged(loss_E, self._previous_E, terms.all_right, trace)}
        return {"failed": ~finite_E, **learned, "max_steps": steps_E >= self._max_steps}

    def _descend(self, params: EditParams, weighed: _Weighed, active_E: Tensor | None) -> tuple[EditParams, State]:
        with stage("edit: backward and update"):
            return self._optimizer.descend(params, weighed.state, weighed.objective_E, active_E)

    def _is_recorded(self) -> bool:
        """Whether the next step is a CUDA graph; records one where it pays."""
        if self._recording is None and self._is_worth_recording and self._steps_of_batch:
            left = self._max_steps - min(self._progress.steps[member] for member in self._progress.members)
            if left >= _WORTH_RECORDING:
                self._record()
                self._is_worth_recording = self._recording is not None
        return self._recording is not None

    def _record(self) -> None:
        """Records a step that updates parameters and state in place."""
        assert self._state is not None
        state = self._state
        recorded: list[_Recording] = []

        def step() -> None:
            # New leaves for the recorded step: autograd binds a leaf to the stream of its first use.
            params = _aliases(self._params)
            weighed = self._weigh(params, replace(state, delta=_aliases(state.delta)), self._optimizer.learns)
            moved, new = self._descend(params, weighed, weighed.active_E)
            recorded[:] = [_Recording(weighed.names, weighed.table, weighed.trace)]
            with torch.no_grad():
                for name, value in moved.items():
                    self._params[name].copy_(value)
                state.copy_(new)
                self._active_E.copy_(weighed.active_E)
                self._previous_E.copy_(weighed.loss_E)

        with unmeasured():
            start = cuda_graphs.recorded(step, self._device)
        self._recording = None if start is None else replace(recorded[0], start=start)

    def _replayed(self) -> Trace:
        assert self._recording is not None
        with stage("edit: recorded steps"):
            self._recording.start()
            self._progress.add_step(self._recording.names, self._recording.table)
        return self._recording.trace

    def _remove_finished(self, trace: Trace) -> None:
        """Moves finished edits from the batch to the results."""
        assert self._state is not None
        progress = self._progress
        finished = self._editor.finished(_detached(self._params), trace, self._batch)
        for row, member in enumerate(progress.members):
            if not progress.is_active[row]:
                self._finished[member] = {
                    name: value[row : row + 1].to(self._results_on, copy=True) for name, value in finished.items()
                }
                if self._start is not None:
                    delta = self._state.delta or self._start.delta
                    row_of = slice(row, row + 1) if self._state.delta else slice(None)
                    self._deltas[member] = {name: value.detach()[row_of].clone() for name, value in delta.items()}
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
        """Fills the batch with waiting edits, and gathers its tensors."""
        progress = self._progress
        staying = len(progress.members)
        progress.admit(self._width - staying)
        self._recording, self._steps_of_batch = None, 0
        if not progress.members:
            return
        members = torch.tensor(progress.members, device=self._device)
        # No copy if all edits move together.
        if progress.members == list(range(self._all.num_edits)):
            batch, self._prefix = self._all, self._all_prefix
        else:
            batch, self._prefix = self._all.take(members), self._all_prefix.take(members)
        at_once = self._objective.slots_at_once(batch.slots)
        self._batch = batch if at_once == batch.slots else batch.select(at_once)
        if self._objective.compares:
            with stage("edit: prefix"), torch.no_grad():
                if len(members) > staying or self._base_EKTD is None:
                    self._base_EKTD = self._unedited_states(batch, len(at_once))
                    self._weight_EK = self._objective.weights_of_locality(self._backbone, batch, self._base_EKTD)
                self._present_EK = batch.present_EK
                if self._weight_EK is not None:
                    self._present_EK = batch.present_EK & (self._weight_EK > 0)
                if self._batch is batch:
                    self._unedited = self._objective.unedited(self._backbone, batch, self._base_EKTD, self._weight_EK)
        if len(members) > staying:
            rows = members[staying:]
            new = (
                {name: value[rows] for name, value in self._initial.items()}
                if self._initial
                else self._init(self._all.take(rows), self._all_prefix.take(rows))
            )
            if staying and self._state is not None:
                self._origin, self._params = (stack_params([old, new]) for old in (self._origin, self._params))
                self._state = self._optimizer.joined(self._state, new)
            else:
                self._origin = new if self._optimizer.learns else {}
                # A copy, since a step may move the parameters in place.
                self._params = {name: value.clone(memory_format=torch.contiguous_format) for name, value in new.items()}
                self._state = self._optimizer.init(new)
        self._active_E = torch.ones(len(members), dtype=torch.bool, device=self._device)
        self._previous_E = torch.cat(
            [self._previous_E, self._previous_E.new_full((len(members) - staying,), torch.inf)]
        )
        self._params = _leaves(self._params, self._editor.frozen if self._max_steps > 0 else self._params)
        self._is_worth_recording = (
            self._max_steps > 0
            and cuda_graphs.are_used(self._device)
            and not getattr(self._backbone, "is_split", False)
            and is_small(self._backbone, self._editor, self._objective, self._batch, self._prefix, self._params)
        )

    @property
    def _device(self) -> torch.device:
        return self._all.tokens_EKS.device

    def results(self, edit_ids: tuple[str, ...], seconds: float) -> list[EditResult]:
        results = self._progress.results(edit_ids, self._finished, seconds)
        return [replace(result, delta=self._deltas.get(number, {})) for number, result in enumerate(results)]


def _detached(params: EditParams) -> EditParams:
    return {name: value.detach() for name, value in params.items()}


def _leaves(params: EditParams, frozen: Container[str]) -> EditParams:
    """Copies that require gradients, except those that are frozen."""
    return {name: value.detach().clone().requires_grad_(name not in frozen) for name, value in params.items()}


def _aliases(params: EditParams) -> EditParams:
    """Leaves that share memory with `params`."""
    return {name: value.detach().requires_grad_(value.requires_grad) for name, value in params.items()}
