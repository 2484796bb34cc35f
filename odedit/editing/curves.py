"""What the inner loop knows on the host: which edits move, why the others stopped, and what every step showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from odedit.inputs.batch import EditParams
from odedit.runtime.brief import brief

STOP_REASONS = ("failed", "worst_token_nll", "converged", "max_steps")


@dataclass(frozen=True)
class EditResult:
    """One finished edit.

    Attributes:
        params: phi_e of this edit alone (axis 0 has length 1), as `Editor.finished` made it.
        steps: Primal steps taken.
        stop_reason: One of `STOP_REASONS`.
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

    __repr__ = brief


class Progress:
    """Of all edits of a batch, and of the members that are in it now."""

    def __init__(self, num_edits: int) -> None:
        self.members: list[int] = []  # of the batch as it is now, by their number among all
        self.is_active: list[bool] = []  # whether they move on
        self.steps = [0] * num_edits
        self._waiting = list(range(num_edits))
        self._reasons = [""] * num_edits
        self._curves: list[dict[str, list[float]]] = [{} for _ in range(num_edits)]

    def admit(self, count: int) -> None:
        """Takes up to `count` of the edits that wait into the batch, behind the others."""
        new, self._waiting = self._waiting[:count], self._waiting[count:]
        self.members += new
        self.is_active += [True] * len(new)

    def keep_active(self) -> None:
        """Forgets the edits that leave the batch, but for their curves and reasons."""
        self.members = [member for member, active in zip(self.members, self.is_active, strict=True) if active]
        self.is_active = [True] * len(self.members)

    def take_in(self, names: Sequence[str], table: Tensor) -> None:
        """What a step has shown, in its one transfer from the device; an edit that has stopped shows nothing more."""
        columns = dict(zip(names, table.cpu().tolist(), strict=True))
        stops = {name: columns.pop(name) for name in names if name in STOP_REASONS}
        for row, member in enumerate(self.members):
            if not self.is_active[row]:
                continue
            for name, values in columns.items():
                self._curves[member].setdefault(name, []).append(values[row])
            reasons = [name for name, values in stops.items() if values[row]]
            if reasons:
                self._reasons[member], self.is_active[row] = reasons[0], False
            else:
                self.steps[member] += 1

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
