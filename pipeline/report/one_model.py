"""What a report says about a committed model: edits that hold, what the others answer, interference, contradictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from odedit.data.pool import normal
from pipeline.run_folder.committed import SINGLE
from pipeline.run_folder.outcomes import RANKED, rank
from pipeline.run_folder.rows import EDITED, SKIPPED, Row, parts, read_rows
from pipeline.run_folder.workspace import Workspace

_SHOWN = 20
_HOLDS = 1.0


@dataclass(frozen=True)
class OneModel:
    """Edits of a committed model.

    Attributes:
        count: Number of edits in the model.
        held: Number of them that hold.
        instead: What the others answer, and how many.
        alone: Number of them that held as single edits; None: there are no single edits of them.
        lost: Ids of the first edits that held alone and do not hold in the model.
        num_lost: Number of those.
        contradictions: Reasons of the first records that were left out because they contradict others.
    """

    count: int
    held: int
    instead: dict[str, int]
    alone: int | None
    lost: list[str]
    num_lost: int
    contradictions: list[str]


def one_model(workspace: Workspace) -> OneModel | None:
    """The edits of the model in a run's folder; None if the run committed none."""
    if not workspace.committed.exists():
        return None
    columns = (*RANKED, "target", "answer_before", "answer_after")
    rows = list(read_rows(parts(workspace), columns, (EDITED,)))
    failing = [row for row in rows if not _holds(row)]
    targets = {normal(row["target"]) for row in rows if row.get("target")}
    single = Workspace(workspace.out / SINGLE)
    alone = _held_ids(single) if single.results.is_folder() else None
    lost = [row["edit_id"] for row in failing if alone is not None and row["edit_id"] in alone]
    return OneModel(
        count=len(rows),
        held=len(rows) - len(failing),
        instead=dict(Counter(_instead(row, targets) for row in failing).most_common()),
        alone=None if alone is None else sum(row["edit_id"] in alone for row in rows),
        lost=lost[:_SHOWN],
        num_lost=len(lost),
        contradictions=list(islice(_contradictions(workspace), _SHOWN)),
    )


def _holds(row: Row) -> bool:
    return rank(row)[0] == _HOLDS


def _held_ids(single: Workspace) -> set[str]:
    return {row["edit_id"] for row in read_rows(parts(single), RANKED, (EDITED,)) if _holds(row)}


def _instead(row: Row, targets: set[str]) -> str:
    """Kind of the answer of an edit that does not hold."""
    after = row.get("answer_after")
    if after is None:
        return "not generated"
    if row.get("answer_before") == after:
        return "the answer of the unedited model"
    if normal(after) in targets:
        return "the new answer of another edit"
    return "something else"


def _contradictions(workspace: Workspace) -> Iterator[str]:
    for row in read_rows(parts(workspace), ("edit_id", "status", "error"), (SKIPPED,)):
        if "contradicts" in (row["error"] or ""):
            yield row["error"]
