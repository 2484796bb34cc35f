"""The only inner loop: E independent edits, optimised together, each stopped by its own rule."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import Editor, Trace
from odedit.edits import EditBatch, EditParams
from odedit.encoding import gather_positions
from odedit.objective import Objective, Terms
from odedit.primal_dual import PrimalDual


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
    batch = batch.select(objective.slots(editor, batch))
    prefix = backbone.prefix(batch, *editor.sites)
    with torch.no_grad():
        base_EKTD = gather_positions(backbone.suffix(prefix), batch.predict_EKT)
    max_steps = editor.max_steps if stopping.max_steps is None or editor.max_steps == 0 else stopping.max_steps
    optimizer = PrimalDual(editor, objective.config, max(max_steps, 1), seed)

    origin = editor.init(backbone, batch)
    params = {name: value.detach().clone().requires_grad_(name not in editor.frozen) for name, value in origin.items()}
    state = optimizer.init(params)
    progress = _Progress(batch.num_edits, base_EKTD.device)
    for step in range(max_steps + 1):
        with editor.applied(backbone, params, batch) as trace:
            hidden_EKSD = backbone.suffix(prefix)
        terms = objective(backbone, editor, params, trace, batch, hidden_EKSD, base_EKTD)
        progress.observe(terms, trace, editor, stopping, is_last=step == max_steps)
        params, state, moved = optimizer.step(params, origin, state, terms, progress.active_E, step)
        progress.log(terms, moved)
        if not bool(progress.active_E.any()):
            break

    finished = editor.finished({name: value.detach() for name, value in params.items()}, trace, batch)
    seconds = (time.perf_counter() - started) / batch.num_edits
    return progress.results(batch.edit_ids, finished, state.steps_E.tolist(), seconds)


class _Progress:
    """Which edits still move, why the others stopped, and what every step showed."""

    def __init__(self, num_edits: int, device: torch.device) -> None:
        self.active_E = torch.ones(num_edits, dtype=torch.bool, device=device)
        self._previous_E = torch.full((num_edits,), torch.inf, device=device)
        self._reasons = [""] * num_edits
        self._curves: list[dict[str, list[float]]] = [{} for _ in range(num_edits)]
        # An edit's last logged step is the one it stopped at.
        self._logged_E = torch.ones(num_edits, dtype=torch.bool)

    def observe(self, terms: Terms, trace: Trace, editor: Editor, stopping: Stopping, *, is_last: bool) -> None:
        self._logged_E = self.active_E.cpu()
        loss_E = terms.total.detach()
        finite_E = torch.isfinite(loss_E) & torch.isfinite(terms.penalty.detach())
        self._stop(~finite_E, "failed")
        if stopping.worst_token_nll is not None:
            self._stop(terms.worst_nll <= stopping.worst_token_nll, "worst_token_nll")
        else:
            self._stop(editor.converged(loss_E, self._previous_E, terms.all_right, trace), "converged")
        if is_last:
            self._stop(torch.ones_like(self.active_E), "max_steps")
        self._previous_E = loss_E

    def _stop(self, which_E: Tensor, reason: str) -> None:
        stopping_E = self.active_E & which_E
        for index in stopping_E.nonzero().flatten().tolist():
            self._reasons[index] = reason
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
        for index in self._logged_E.nonzero().flatten().tolist():
            for name, values in table.items():
                self._curves[index].setdefault(name, []).append(values[index])

    def results(
        self, edit_ids: tuple[str, ...], params: EditParams, steps: list[int], seconds: float
    ) -> list[EditResult]:
        return [
            EditResult(
                edit_id=edit_id,
                params={name: value[index : index + 1].clone() for name, value in params.items()},
                steps=steps[index],
                stop_reason=self._reasons[index],
                seconds=seconds,
                curves=self._curves[index],
                error=self._failure(index, steps[index]),
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
