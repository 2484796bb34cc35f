"""Host-side record of the inner loop: active edits, stop reasons, and the curves of every edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from torch import Tensor

from odedit.inputs.batch import EditParams
from odedit.inputs.html import table_html
from odedit.runtime.brief import brief

STOP_REASONS = ("failed", "worst_token_nll", "converged", "max_steps")


@dataclass(frozen=True)
class EditResult:
    """One finished edit.

    Attributes:
        params: phi_e of this edit alone (axis 0 has length 1), as returned by `Editor.finished`.
        steps: Primal steps taken.
        stop_reason: One of `STOP_REASONS`.
        seconds: Wall-clock time of the whole loop, divided by its edits.
        curves: Per evaluated step: rel, loc, gen, own, penalty, lambda, objective, worst_nll, g_<environment>.
        error: Reason of a failure, else None; do not use the params of a failed edit.
        delta: Weights of the multiplier network at the end, of edits with a `Start`; {}: lambda is not learned.
    """

    edit_id: str
    params: EditParams
    steps: int
    stop_reason: str
    seconds: float
    curves: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None
    delta: EditParams = field(default_factory=dict)

    __repr__ = brief

    def _repr_html_(self) -> str:
        """How it ended, first and last value of each curve, and the shapes of its parameters."""
        state = self.error or f"{self.stop_reason} after {self.steps} steps, {self.seconds:.3g} s"
        curves = [
            (escape(name), f"{values[0]:.4g}", f"{values[-1]:.4g}")
            for name, values in self.curves.items()
            if any(values)
        ]
        shapes = [(escape(name), str(tuple(value.shape))) for name, value in self.params.items()]
        title = f"<strong>{escape(self.edit_id)}</strong>: {escape(state)}"
        return title + table_html(("curve", "first", "last"), curves) + table_html(("parameter", "shape"), shapes)


class Progress:
    """Progress of all edits, and the members of the present batch.

    Attributes:
        members: Indices of the edits in the present batch.
        is_active: True for members that are still optimised.
        steps: Steps taken by every edit.
    """

    def __init__(self, num_edits: int) -> None:
        self.members: list[int] = []
        self.is_active: list[bool] = []
        self.steps = [0] * num_edits
        self._waiting = list(range(num_edits))
        self._reasons = [""] * num_edits
        self._curves: list[dict[str, list[float]]] = [{} for _ in range(num_edits)]

    def admit(self, count: int) -> None:
        """Appends up to `count` waiting edits to the batch."""
        new, self._waiting = self._waiting[:count], self._waiting[count:]
        self.members += new
        self.is_active += [True] * len(new)

    def keep_active(self) -> None:
        """Removes finished edits from the batch; their curves and stop reasons stay."""
        self.members = [member for member, active in zip(self.members, self.is_active, strict=True) if active]
        self.is_active = [True] * len(self.members)

    def add_step(self, names: Sequence[str], table: Tensor) -> None:
        """Stores the curves and stop reasons of one step; stopped edits are skipped.

        Args:
            names: Row names of the table; a row of `STOP_REASONS` is non-zero for edits that stop.
            table: Values `(rows, E)`, copied from the device at once.
        """
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
        values = ", ".join(f"{name}={value:.4g}" for name, value in last.items())
        return f"the objective is not finite after {steps} steps ({values}); try a lower editor.learning_rate."
