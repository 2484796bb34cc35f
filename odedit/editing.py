"""The only inner loop: independent edits, optimised together, each stopped by its own rule.

A finished edit costs as much per step as one that moves. So as soon as enough have finished, they leave the batch, and
edits that wait take their places.
"""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import Editor, Trace
from odedit.edits import EditBatch, EditParams, stack_params
from odedit.objective import Objective, Terms, Unedited
from odedit.primal_dual import PrimalDual, State
from odedit.stages import stage
from odedit.widths import width_like_native

_FULL_ENOUGH = 0.75
"""Share of moving edits below which the finished ones leave the batch: copying the rest costs about one step."""


@dataclass(frozen=True)
class Stopping:
    """When an edit stops moving.

    Attributes:
        max_steps: Bound of the loop; None: the editor's published number.
        worst_token_nll: Stops when the least likely target token has come below this NLL: the mean would hide an
            unlearned first token behind a confident second one. None: the editor's own rule.
    """

    max_steps: int | None = None
    worst_token_nll: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"max_steps: got {self.max_steps}, expected at least 0, or null for the editor's own.")
        if self.worst_token_nll is not None and not self.worst_token_nll > 0:
            raise ValueError(f"worst_token_nll: got {self.worst_token_nll}, expected a number > 0, or null.")


@dataclass(frozen=True)
class EditResult:
    """One finished edit.

    Attributes:
        params: phi_e of this edit alone (axis 0 has length 1), as `Editor.finished` made it.
        steps: Primal steps taken.
        stop_reason: `worst_token_nll`, `converged`, `max_steps` or `failed`.
        seconds: Wall-clock time of the whole loop, divided by its edits.
        curves: Per evaluated step: rel, loc, gen, own, penalty, lambda, objective, worst_nll, g_<environment>.
        error: Why the edit failed, else None; a failed edit's params are not to be used.
    """

    edit_id: str
    params: EditParams
    steps: int
    stop_reason: str
    seconds: float
    curves: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None


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
            the base editor's own loss, see `odedit.widths`. None: no further bound.
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
        self._takes_steps = max_steps > 0
        self._results_on = results_on
        self._objective = objective.for_one_gradient()
        self._optimizer = PrimalDual(editor, objective.config, max(max_steps, 1), seed)
        self._progress = _Progress(batch.num_edits, batch.tokens_EKS.device, stopping, max_steps)
        self._finished: dict[int, EditParams] = {}
        # Of all edits. What follows is of those in the batch, axis 0 in the order of `progress.members`.
        self._all = batch.select(objective.slots(editor, batch))
        with stage("edit: prefix"), torch.no_grad():
            self._all_prefix = backbone.prefix(self._all, *editor.sites, positionwise=editor.positionwise)
        self._width = min(width, width_like_native(backbone, editor, objective, batch, self._all_prefix))
        # One product with a hypernetwork for all edits; what it makes is the edits themselves.
        self._made = {} if self._takes_steps else self._init(self._all)
        self._origin: EditParams = {}
        self._params: EditParams = {}
        self._state: State | None = None
        self._base_EKTD: Tensor | None = None
        self._unedited: Unedited | None = None
        self._admit()

    def _init(self, batch: EditBatch) -> EditParams:
        with stage("edit: start"):
            return _detached(self._editor.init(self._backbone, batch))

    def has_edits(self) -> bool:
        return bool(self._progress.members)

    def step(self) -> None:
        """One forward of all edits in the batch, and one step of those that move on."""
        assert self._state is not None
        progress = self._progress
        with stage("edit: forward"), self._editor.applied(self._backbone, self._params, self._batch) as trace:
            hidden = self._backbone.suffix(self._prefix, self._objective.read(self._batch))
        with stage("edit: risks"):
            terms = self._objective(
                self._backbone, self._editor, self._params, trace, self._batch, hidden, self._unedited
            )
            progress.observe(terms, trace, self._editor, self._state.steps_E)
        forwarded = self._params
        with stage("edit: backward and update"):
            self._params, self._state, moved = self._optimizer.step(
                forwarded, self._origin, self._state, terms, progress.active_E
            )
        progress.log(terms, moved)
        del hidden, terms  # of the last step nobody took a gradient: what was kept for it is still there
        if int(progress.active_E.sum()) <= _FULL_ENOUGH * len(progress.members):
            self._let_go(forwarded, trace)
            self._admit()

    def _let_go(self, forwarded: EditParams, trace: Trace) -> None:
        """Takes the finished edits out of the batch."""
        assert self._state is not None
        finished = self._editor.finished(_detached(forwarded), trace, self._batch)
        steps = self._state.steps_E.tolist()
        for row in (~self._progress.active_E).nonzero().flatten().tolist():
            member = self._progress.members[row]
            self._finished[member] = {
                name: value[row : row + 1].to(self._results_on, copy=True) for name, value in finished.items()
            }
            self._progress.steps[member] = steps[row]
        stay = self._progress.active_E.nonzero().flatten()
        self._base_EKTD = None if self._base_EKTD is None else self._base_EKTD[stay]
        self._progress.keep(stay)
        self._origin = {name: value[stay] for name, value in self._origin.items()}
        self._params = {name: value.detach()[stay] for name, value in self._params.items()}
        self._state = self._state.take(stay)

    def _admit(self) -> None:
        """Fills the places that are free with edits that wait, and gathers what belongs to the batch."""
        progress = self._progress
        staying = len(progress.members)
        progress.admit(self._width - staying)
        if not progress.members:
            return
        members = torch.tensor(progress.members, device=self._all.tokens_EKS.device)
        self._batch, self._prefix = self._all.take(members), self._all_prefix.take(members)
        if self._objective.compares:
            with stage("edit: prefix"), torch.no_grad():
                if len(members) > staying or self._base_EKTD is None:
                    # In the same batch as under the edit: rounding depends on it, and phi_0 shall differ in nothing.
                    self._base_EKTD = self._backbone.suffix(self._prefix, self._batch.predict_EKT)
                self._unedited = self._objective.unedited(self._backbone, self._batch, self._base_EKTD)
        if len(members) > staying:
            rows = members[staying:]
            new = {n: v[rows] for n, v in self._made.items()} if self._made else self._init(self._all.take(rows))
            if staying and self._state is not None:
                self._origin, self._params = (stack_params([old, new]) for old in (self._origin, self._params))
                self._state = self._optimizer.joined(self._state, new)
            else:
                self._origin = self._params = new
                self._state = self._optimizer.init(new)
        frozen = self._editor.frozen if self._takes_steps else self._params
        self._params = _leaves(self._params, frozen)

    def results(self, edit_ids: tuple[str, ...], seconds: float) -> list[EditResult]:
        return self._progress.results(edit_ids, self._finished, seconds)


def _detached(params: EditParams) -> EditParams:
    return {name: value.detach() for name, value in params.items()}


def _leaves(params: EditParams, frozen: Container[str]) -> EditParams:
    """Copies that gradients are taken with respect to, but for those that are frozen."""
    return {name: value.detach().clone().requires_grad_(name not in frozen) for name, value in params.items()}


class _Progress:
    """Which edits still move, why the others stopped, and what every step showed."""

    def __init__(self, num_edits: int, device: torch.device, stopping: Stopping, max_steps: int) -> None:
        self.members: list[int] = []  # of the batch as it is now, by their number among all
        self.steps = [0] * num_edits
        self.active_E = torch.ones(0, dtype=torch.bool, device=device)
        self._waiting = list(range(num_edits))
        self._stopping, self._max_steps = stopping, max_steps
        self._previous_E = torch.ones(0, device=device)
        self._reasons = [""] * num_edits
        self._curves: list[dict[str, list[float]]] = [{} for _ in range(num_edits)]
        # An edit's last logged step is the one it stopped at.
        self._logged_E = self.active_E

    def admit(self, count: int) -> None:
        """Takes up to `count` of the edits that wait into the batch, behind the others."""
        new, self._waiting = self._waiting[:count], self._waiting[count:]
        self.members += new
        self.active_E = torch.cat([self.active_E, self.active_E.new_ones(len(new))])
        self._previous_E = torch.cat([self._previous_E, self._previous_E.new_full((len(new),), torch.inf)])

    def keep(self, stay: Tensor) -> None:
        """Forgets the edits that leave the batch, but for their curves and reasons."""
        self.members = [self.members[row] for row in stay.tolist()]
        self.active_E, self._previous_E = self.active_E[stay], self._previous_E[stay]

    def observe(self, terms: Terms, trace: Trace, editor: Editor, steps_E: Tensor) -> None:
        self._logged_E = self.active_E.cpu()
        loss_E = terms.total.detach()
        finite_E = torch.isfinite(loss_E) & torch.isfinite(terms.penalty.detach())
        self._stop(~finite_E, "failed")
        if self._stopping.worst_token_nll is not None:
            self._stop(terms.worst_nll <= self._stopping.worst_token_nll, "worst_token_nll")
        else:
            self._stop(editor.converged(loss_E, self._previous_E, terms.all_right, trace), "converged")
        self._stop(steps_E >= self._max_steps, "max_steps")
        self._previous_E = loss_E

    def _stop(self, which_E: Tensor, reason: str) -> None:
        stopping_E = self.active_E & which_E
        for row in stopping_E.nonzero().flatten().tolist():
            self._reasons[self.members[row]] = reason
        self.active_E = self.active_E & ~stopping_E

    def log(self, terms: Terms, moved: dict[str, Tensor]) -> None:
        columns = {
            **terms.risks,
            "penalty": terms.penalty,
            "worst_nll": terms.worst_nll,
            **{f"g_{name}": gradient for name, gradient in terms.scale_gradients.items()},
            **moved,
        }
        # One transfer from the device for all of them.
        table = torch.stack([value.detach().float() for value in columns.values()]).cpu().tolist()
        for row in self._logged_E.nonzero().flatten().tolist():
            for name, values in zip(columns, table, strict=True):
                self._curves[self.members[row]].setdefault(name, []).append(values[row])

    def results(self, edit_ids: tuple[str, ...], finished: dict[int, EditParams], seconds: float) -> list[EditResult]:
        return [
            EditResult(
                edit_id=edit_id,
                params=finished[index],
                steps=self.steps[index],
                stop_reason=self._reasons[index],
                seconds=seconds,
                curves=self._curves[index],
                error=self._failure(index, self.steps[index]),
            )
            for index, edit_id in enumerate(edit_ids)
        ]

    def _failure(self, index: int, steps: int) -> str | None:
        if self._reasons[index] != "failed":
            return None
        last = {
            name: values[-1] for name, values in self._curves[index].items() if name in ("rel", "loc", "gen", "own")
        }
        shown = ", ".join(f"{name}={value:.4g}" for name, value in last.items())
        return f"the objective is not finite after {steps} steps ({shown}); a lower editor.learning_rate may help."
