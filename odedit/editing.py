"""The only inner loop: E independent edits, optimised together, each stopped by its own rule."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import Editor, Trace
from odedit.edits import EditBatch, EditParams
from odedit.encoding import gather_positions
from odedit.objective import Objective, Terms
from odedit.primal_dual import PrimalDual, State

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
        seconds: Wall-clock time of the batch's loop, divided by its edits.
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
) -> list[EditResult]:
    """Optimises the E edits of `batch`, each as if it were alone.

    Args:
        batch: The supervision batch of `encode_requests`.
        seed: Of the multiplier network and the sketch; the same for every edit.

    Returns:
        E results, in order. An edit whose objective is not finite is returned with `error`, and does not disturb
        others.
    """
    started = time.perf_counter()
    run = _Run.start(backbone, editor, objective, batch, stopping, seed)
    while run.has_edits():
        run.step()
    seconds = (time.perf_counter() - started) / batch.num_edits
    return run.results(batch.edit_ids, seconds)


@dataclass
class _Run:
    """The edits that still move, and what the others have become.

    A finished edit costs as much per step as one that moves. So as soon as enough have finished, they leave the batch:
    the stragglers go on alone.
    """

    backbone: Backbone
    editor: Editor
    objective: Objective
    optimizer: PrimalDual
    progress: _Progress
    batch: EditBatch
    prefix: Prefix
    base_EKTD: Tensor
    origin: EditParams
    params: EditParams
    state: State
    step_number: int = 0
    finished: dict[int, EditParams] = field(default_factory=dict)

    @classmethod
    def start(
        cls, backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, stopping: Stopping, seed: int
    ) -> _Run:
        max_steps = editor.max_steps if stopping.max_steps is None or editor.max_steps == 0 else stopping.max_steps
        optimizer = PrimalDual(editor, objective.config, max(max_steps, 1), seed)
        progress = _Progress(batch.num_edits, batch.tokens_EKS.device, stopping, max_steps)
        batch = batch.select(objective.slots(editor, batch))
        prefix = backbone.prefix(batch, *editor.sites)
        with torch.no_grad():
            base_EKTD = gather_positions(backbone.suffix(prefix), batch.predict_EKT)
        origin = {name: value.detach() for name, value in editor.init(backbone, batch).items()}
        params = _leaves(origin, editor)
        state = optimizer.init(params)
        return cls(backbone, editor, objective, optimizer, progress, batch, prefix, base_EKTD, origin, params, state)

    def has_edits(self) -> bool:
        return bool(self.progress.members)

    def step(self) -> None:
        """One forward of all edits in the batch, and one step of those that move on."""
        with self.editor.applied(self.backbone, self.params, self.batch) as trace:
            hidden_EKSD = self.backbone.suffix(self.prefix)
        terms = self.objective(self.backbone, self.editor, self.params, trace, self.batch, hidden_EKSD, self.base_EKTD)
        progress = self.progress
        progress.observe(terms, trace, self.editor, is_last=self.step_number == progress.max_steps)
        forwarded = self.params
        self.params, self.state, moved = self.optimizer.step(
            forwarded, self.origin, self.state, terms, progress.active_E, self.step_number
        )
        progress.log(terms, moved)
        self.step_number += 1
        if int(progress.active_E.sum()) <= _FULL_ENOUGH * len(progress.members):
            self._let_go(forwarded, trace)

    def _let_go(self, forwarded: EditParams, trace: Trace) -> None:
        """Takes the finished edits out of the batch."""
        finished = self.editor.finished({name: value.detach() for name, value in forwarded.items()}, trace, self.batch)
        steps = self.state.steps_E.tolist()
        for row in (~self.progress.active_E).nonzero().flatten().tolist():
            member = self.progress.members[row]
            self.finished[member] = {name: value[row : row + 1].clone() for name, value in finished.items()}
            self.progress.steps[member] = steps[row]
        stay = self.progress.active_E.nonzero().flatten()
        self.progress.keep(stay)
        if len(stay):
            self.batch, self.prefix = self.batch.take(stay), self.prefix.take(stay)
            self.base_EKTD = self.base_EKTD[stay]
            self.origin = {name: value[stay] for name, value in self.origin.items()}
            self.params = _leaves({name: value[stay] for name, value in self.params.items()}, self.editor)
            self.state = self.state.take(stay)

    def results(self, edit_ids: tuple[str, ...], seconds: float) -> list[EditResult]:
        return self.progress.results(edit_ids, self.finished, seconds)


def _leaves(params: EditParams, editor: Editor) -> EditParams:
    """Copies that gradients are taken with respect to, but for what the editor keeps frozen."""
    return {name: value.detach().clone().requires_grad_(name not in editor.frozen) for name, value in params.items()}


class _Progress:
    """Which edits still move, why the others stopped, and what every step showed."""

    def __init__(self, num_edits: int, device: torch.device, stopping: Stopping, max_steps: int) -> None:
        self.max_steps = max_steps
        self.members = list(range(num_edits))  # of the batch as it is now, by their number at the start
        self.steps = [0] * num_edits
        self.active_E = torch.ones(num_edits, dtype=torch.bool, device=device)
        self._stopping = stopping
        self._previous_E = torch.full((num_edits,), torch.inf, device=device)
        self._reasons = [""] * num_edits
        self._curves: list[dict[str, list[float]]] = [{} for _ in range(num_edits)]
        # An edit's last logged step is the one it stopped at.
        self._logged_E = torch.ones(num_edits, dtype=torch.bool)

    def keep(self, stay: Tensor) -> None:
        """Forgets the edits that leave the batch, but for their curves and reasons."""
        self.members = [self.members[row] for row in stay.tolist()]
        self.active_E, self._previous_E = self.active_E[stay], self._previous_E[stay]

    def observe(self, terms: Terms, trace: Trace, editor: Editor, *, is_last: bool) -> None:
        self._logged_E = self.active_E.cpu()
        loss_E = terms.total.detach()
        finite_E = torch.isfinite(loss_E) & torch.isfinite(terms.penalty.detach())
        self._stop(~finite_E, "failed")
        if self._stopping.worst_token_nll is not None:
            self._stop(terms.worst_nll <= self._stopping.worst_token_nll, "worst_token_nll")
        else:
            self._stop(editor.converged(loss_E, self._previous_E, terms.all_right, trace), "converged")
        if is_last:
            self._stop(torch.ones_like(self.active_E), "max_steps")
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
        table = {name: value.detach().float().cpu().tolist() for name, value in columns.items()}
        for row in self._logged_E.nonzero().flatten().tolist():
            for name, values in table.items():
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
