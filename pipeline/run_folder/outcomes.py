"""Edits of a run with their probes: what was asked, what was answered before and after, and whether that is right.

Rows have the answers and scores, `records.parquet` has the questions and pictures. Rows of versions that kept no
answers to the probes have their scores alone.
"""

from __future__ import annotations

import difflib
import heapq
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from odedit.data.fields import ImageReference, ProbeText, edit_text, probe_texts
from odedit.data.images import ImageReader
from odedit.errors import InputError
from odedit.evaluation.columns import BEFORE, FAR, column
from odedit.evaluation.edited import EDITED_PROBE
from odedit.evaluation.statistics import MAIN
from odedit.inputs.batch import RELIABILITY, is_locality
from odedit.runtime.addresses import masked
from pipeline.config.run import load
from pipeline.run_folder.rows import EDITED, FIXED_COLUMNS, Row, parts, read_rows
from pipeline.run_folder.sources import resolve
from pipeline.run_folder.workspace import Workspace

_WHOLE = ("generated_exact", "exact", "whole")
"""Endings of the columns that say whether a whole answer is right or unchanged, the first that a row has."""
RANKED = ("edit_id", "status", *MAIN, *(column(RELIABILITY, ending) for ending in _WHOLE[:2]))
"""Columns that `rank` reads."""


@dataclass(frozen=True)
class ProbeOutcome:
    """One question of a record, and the answers of the unedited and of the edited model.

    Attributes:
        name: Metric: `rel` for the edit itself, `t_gen`, ...
        prompt: Question; None: not known.
        target: Right answer; for a locality probe that of the record, which is not judged. None: not known.
        image: Picture; None: none.
        before, after: Generated answers; None: not generated, or of a version that did not keep them.
        score: Share of right tokens, for a locality probe of unchanged ones; None: not measured.
        is_right: Whether the answer after the edit is the target, or, for a locality probe, unchanged; None: unknown.
        was_right: Whether the answer before was the target; None for a locality probe, and if unknown.
    """

    name: str
    prompt: str | None
    target: str | None
    image: ImageReference | None
    before: str | None
    after: str | None
    score: float | None
    is_right: bool | None
    was_right: bool | None


@dataclass(frozen=True)
class EditOutcome:
    """One record of a run.

    Attributes:
        row: Columns of its result row that every run has (`FIXED_COLUMNS`), without `answers`.
        old_answer: The answer to be replaced, according to the record; None: not known.
        probes: The edit itself (`rel`), then its other probes; of a skipped record none.
    """

    row: Row
    old_answer: str | None
    probes: tuple[ProbeOutcome, ...]

    @property
    def edit_id(self) -> str:
        return str(self.row["edit_id"])

    @property
    def holds(self) -> bool | None:
        """Whether the edited question is answered right; None: not edited, or not measured."""
        return self.probes[0].is_right if self.probes and self.row["status"] == EDITED else None

    @property
    def mean_score(self) -> float | None:
        """Mean of the main scores; None: not edited."""
        return mean_score(self.row)


def mean_score(row: Row) -> float | None:
    """Mean of a row's main scores; None without any."""
    values = [row[name] for name in MAIN if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def rank(row: Row) -> tuple[float, float]:
    """Sorting key: edits that do not hold, then the others, each by their mean score, then records not edited."""
    if row["status"] != EDITED:
        return 2.0, 0.0
    holds = next((value for name in RANKED[-2:] if (value := row.get(name)) is not None), 0.0)
    return float(holds == 1.0), mean_score(row) or 0.0


def worst_ids(rows: Iterable[Row], count: int) -> list[str]:
    """Edit ids of the `count` first rows by `rank`, equal ones in the order of the rows."""
    ranked = ((rank(row), number, str(row["edit_id"])) for number, row in enumerate(rows))
    return [edit_id for _, _, edit_id in heapq.nsmallest(count, ranked)]


def read_outcomes(workspace: Workspace, edit_ids: Sequence[str], without: Collection[str] = ()) -> list[EditOutcome]:
    """The records with these ids, in the order of the ids; unknown ids are left out.

    Args:
        without: Columns of the rows that are not read, such as the long `losses`.
    """
    wanted = frozenset(edit_ids)
    fields = dict(_fields(workspace, wanted))
    outcomes = {
        row["edit_id"]: outcome(row, fields.get(row["edit_id"])) for row in read_rows(parts(workspace), edit_ids=wanted)
    }
    return [outcomes[edit_id] for edit_id in edit_ids if edit_id in outcomes]


def find_outcome(workspace: Workspace, edit_id: str) -> EditOutcome:
    """One edit of a run. Raises InputError, with ids that are like it, if the run has no such edit."""
    found = read_outcomes(workspace, [edit_id])
    if found:
        return found[0]
    known = [row["edit_id"] for row in read_rows(parts(workspace), ("edit_id",))]
    alike = difflib.get_close_matches(edit_id, known, n=3) or known[:3]
    raise InputError(f"EDIT_ID: {workspace.out} has no edit {masked(edit_id)!r}; it has {', '.join(alike)} and others.")


def _fields(workspace: Workspace, edit_ids: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Edit id and fields of the usable records."""
    if workspace.records.exists():
        columns = ("edit_id", "problem", "fields")
        for row in read_rows([workspace.records], columns, edit_ids=edit_ids):
            if not row["problem"]:
                yield row["edit_id"], json.loads(row["fields"])


def outcome(row: Row, fields: Mapping[str, Any] | None) -> EditOutcome:
    """A row with what its record asks.

    Args:
        fields: The record's fields; None: not known.
    """
    if fields is None:
        own = ProbeText(row.get("prompt") or "", row.get("target") or "")
        texts = {RELIABILITY: own} if row["status"] == EDITED else {}
    else:
        texts = {RELIABILITY: edit_text(fields, row["task"])} | probe_texts(fields, row["task"])
    texts = dict(_judged(texts, row))
    known = (fields or {}).get("pred")
    probes = tuple(_probe(name, text, row) for name, text in texts.items())
    kept = {name: value for name, value in row.items() if name in FIXED_COLUMNS and name != "answers"}
    return EditOutcome(kept, known or row.get("answer_before"), probes)


def _judged(texts: Mapping[str, ProbeText], row: Row) -> Iterator[tuple[str, ProbeText]]:
    """The probes by the names of their columns, which tell those whose answer another record edits."""
    for name, text in texts.items():
        edited = EDITED_PROBE + name.replace("_", "")
        # The right answer is the other record's, which this row does not have.
        yield (name, text) if row.get(edited) is None else (edited, replace(text, target=""))


def _probe(name: str, text: ProbeText, row: Row) -> ProbeOutcome:
    answers = (row.get("answers") or {}).get(name) or {}
    if name == RELIABILITY:
        answers = {when: row.get(f"answer_{when}") for when in ("before", "after")}
    # The plain column of a record with a near probe is the mean of both.
    own = column(name, FAR) if row.get(column(name, FAR)) is not None else name
    return ProbeOutcome(
        name,
        text.prompt,
        text.target or None,
        text.image,
        answers.get("before"),
        answers.get("after"),
        row.get(own),
        _is_whole(row, own),
        None if is_locality(name) else _is_whole(row, own, BEFORE),
    )


def _is_whole(row: Row, name: str, *endings: str) -> bool | None:
    """Whether a whole answer is right or unchanged, by the first column that says so; None: not measured."""
    columns = ("_".join((name, ending, *endings)) for ending in _WHOLE)
    return next((value == 1.0 for each in columns if (value := row.get(each)) is not None), None)


def picture_reader(workspace: Workspace) -> ImageReader | None:
    """Reader of the records' pictures; None if they are not there any more."""
    try:
        return resolve(load(workspace.config).data, workspace.out.text).reader
    except (InputError, OSError):
        return None


def picture_name(image: ImageReference) -> str:
    """Path of a picture as its record names it."""
    return masked(image.path)
