"""What a report says about a committed model: edits that hold, what the others answer, interference, contradictions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from odedit import ways
from odedit.data.pool import normal
from odedit.storage.location import at
from odedit.ways.common.files import read_committed_info
from odedit.ways.sequential import RETENTION
from pipeline.run_folder.committed import SINGLE
from pipeline.run_folder.outcomes import RANKED, rank
from pipeline.run_folder.retention import Check, checks
from pipeline.run_folder.rows import EDITED, SKIPPED, Row, parts, read_rows
from pipeline.run_folder.workspace import STEP, Workspace, read_json

_SHOWN = 20
_HOLDS = 1.0
_TABLE, _PLOT, _STUDY = "table.md", "plot.png", "study.json"


@dataclass(frozen=True)
class OneModel:
    """Edits of a committed model.

    Attributes:
        way: Name of the way that made it.
        count: Number of edits in the model.
        held: Number of them that hold.
        instead: What the others answer, and how many.
        num_alone: Number of the edits that were scored as single edits too; 0: none.
        alone: Number of those that held.
        lost: Ids of the first edits that held alone and do not hold in the model.
        num_lost: Number of those.
        unlearned: Number of edits that do not hold, and of whose answer a token had a probability below one half at the
            end of the training; None: not measured.
        contradictions: Reasons of the first records that were left out because they contradict others.
        num_contradictions: Number of those.
        curves: Figures of the training by name.
        steps: Steps of the training that the curves' points are of; empty: not known.
        retention: What was left of earlier edits, of a model that was made one record after another.
        study: Links to table and plot of the study that the model is an arm of, by name; empty: it is of none.
    """

    way: str
    count: int
    held: int
    instead: Mapping[str, int]
    num_alone: int
    alone: int
    lost: Sequence[str]
    num_lost: int
    unlearned: int | None
    contradictions: Sequence[str]
    num_contradictions: int
    curves: Mapping[str, Sequence[float]]
    steps: Sequence[float]
    retention: Sequence[Check]
    study: Mapping[str, str]


def one_model(workspace: Workspace) -> OneModel | None:
    """The edits of the model in a run's folder; None if the run committed none."""
    if not workspace.committed.exists():
        return None
    info = read_committed_info(workspace.committed)
    columns = (*RANKED, "target", "answer_before", "answer_after", "worst_nll")
    rows = list(read_rows(parts(workspace), columns, (EDITED,)))
    failing = [row for row in rows if not _holds(row)]
    targets = {normal(row["target"]) for row in rows if row.get("target")}
    single = single_edits(workspace)
    known = {} if single is None else {row["edit_id"]: _holds(row) for row in _ranked(single)}
    alone = [known[row["edit_id"]] for row in rows if row["edit_id"] in known]
    lost = [row["edit_id"] for row in failing if known.get(row["edit_id"])]
    contradictions = _contradictions(workspace)
    curves = dict(info.details.get("curves") or {})
    steps = curves.pop(STEP, [])
    retention = checks(info)
    curves = {name: values for name, values in curves.items() if not name.startswith(RETENTION)}
    worst = [row["worst_nll"] for row in failing if row.get("worst_nll") is not None]
    return OneModel(
        way=info.way,
        count=len(rows),
        held=len(rows) - len(failing),
        instead=dict(Counter(_instead(row, targets) for row in failing).most_common()),
        num_alone=len(alone),
        alone=sum(alone),
        lost=lost[:_SHOWN],
        num_lost=len(lost),
        unlearned=sum(value > math.log(2) for value in worst) if worst else None,
        contradictions=contradictions[:_SHOWN],
        num_contradictions=len(contradictions),
        curves=curves,
        steps=steps,
        retention=retention,
        study=_study(workspace),
    )


def single_edits(workspace: Workspace) -> Workspace | None:
    """The run of the single edits that a model was made from; None if there was none, or it is not there any more."""
    settings = (read_json(workspace.run) or {}).get("settings") or {}
    way, given = settings.get("commit.way"), settings.get("--from")
    if way is not None and not ways.find(way).uses_edits:
        return None
    # The setting ends with a digest of the edits.
    out = workspace.out / SINGLE if given is None else at(given.rpartition(" (")[0])
    single = Workspace(out)
    return single if workspace.committed.exists() and single.results.is_folder() else None


def _ranked(workspace: Workspace) -> Iterable[Row]:
    return read_rows(parts(workspace), RANKED, (EDITED,))


def _holds(row: Row) -> bool:
    return rank(row)[0] == _HOLDS


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


def _contradictions(workspace: Workspace) -> list[str]:
    rows = read_rows(parts(workspace), ("edit_id", "status", "error"), (SKIPPED,))
    return [row["error"] for row in rows if "contradicts" in (row["error"] or "")]


def _study(workspace: Workspace) -> dict[str, str]:
    """Links from the run's folder, `STUDY/arms/ARM`."""
    out = workspace.out.parent.parent
    if workspace.out.parent.name != "arms" or not (out / _STUDY).exists():
        return {}
    return {"table": f"../../{_TABLE}", "plot": f"../../{_PLOT}"}
