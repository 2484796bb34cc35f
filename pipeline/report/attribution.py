"""How much of a gain over an editor's own loss is due to its rephrases as training data, and how much to the objective.

The control is the likelihood of the edit and of its rephrases alone (objective `rephrase`), at the same stop: what it
gains over the native loss is due to the rephrases, and what another objective gains over it is due to that objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from odedit.evaluation.statistics import PairedDifference, paired
from pipeline.report.differences import Rows
from pipeline.report.formatting import plus_minus

COLUMNS = ("m_gen", "m_loc_near")


@dataclass(frozen=True)
class Part:
    """The gain in one column, on the records that all three runs have.

    Attributes:
        column: Name of the column.
        total: Objective minus native.
        rephrase: Control minus native.
        objective: Objective minus control.
    """

    column: str
    total: PairedDifference
    rephrase: PairedDifference
    objective: PairedDifference


def parts(native: Rows, control: Rows, objective: Rows, columns: Sequence[str] = COLUMNS) -> list[Part]:
    """The gain of `objective` over `native` in each column that all three runs have."""
    common = native.keys() & control.keys() & objective.keys()
    first, second, third = ({key: rows[key] for key in common} for rows in (native, control, objective))
    totals = paired(first, third, columns)
    by_rephrase, by_objective = paired(first, second, columns), paired(second, third, columns)
    shared = [column for column in columns if column in totals and column in by_rephrase and column in by_objective]
    return [Part(column, totals[column], by_rephrase[column], by_objective[column]) for column in shared]


def sentence(names: tuple[str, str, str], found: Sequence[Part]) -> str:
    """One sentence on the gain of the third of three runs over the first; the second is the control.

    Args:
        names: Names of the native run, of the control and of the objective.
        found: Result of `parts`.
    """
    native, control, objective = names
    clauses = [
        f"{part.column} {_signed(part.total)}, of which {_signed(part.rephrase)} is due to the rephrase ({control} "
        f"against {native}) and {_signed(part.objective)} to the objective"
        for part in found
    ]
    return f"{objective} against {native}: {'; '.join(clauses)}."


def sentences(runs: Mapping[str, Rows], native: str, control: str, objectives: Sequence[str]) -> list[str]:
    """`sentence` of every objective that has records in common with the native run and the control.

    Args:
        runs: Rows by the run's name.
    """
    found = {name: parts(runs[native], runs[control], runs[name]) for name in objectives}
    return [sentence((native, control, name), of_name) for name, of_name in found.items() if of_name]


def _signed(difference: PairedDifference) -> str:
    return ("+" if difference.mean >= 0 else "") + plus_minus(difference)
