"""One record of a task as a single edit reads it, and the scores of records on a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from odedit.backbones import encode_requests
from odedit.data.pool import normal
from odedit.evaluation.edited import Edited, judged_by_edits
from odedit.evaluation.readout import UneditedAnswers
from odedit.evaluation.scores import EvaluationConfig, evaluate_together
from odedit.inputs.batch import EditBatch, EditParams, EditRequest
from odedit.ways.base import Task

_TEACHER_FORCED = EvaluationConfig(generate=False, mmedit=False)
_SCORED_AT_ONCE = 16


def supervision_of(task: Task, request: EditRequest) -> EditBatch:
    """The supervision batch of one record, as that of a single edit.

    Raises:
        InputError, ValueError: The model does not take the record.
    """
    settings = task.objective.config
    if task.negatives is None:  # all pictures of a request are excluded from its hard negatives
        request = request.reading(settings.reads(task.editor))
    sites, joined = task.editor.sites, settings.joins_rephrases
    return encode_requests(task.backbone, [request], task.template, sites, task.negatives, joined)[0]


def edited_by(requests: Iterable[EditRequest]) -> Edited:
    """What the requests edit, by fact and by question; of two edits of one thing the later one counts."""
    facts, questions = {}, {}
    for request in requests:
        new, probe = (request.edit_id, request.edit.target), request.edit
        if probe.fact is not None:
            facts[probe.fact] = new
        if probe.picture is not None:
            questions[probe.picture.key, normal(probe.prompt)] = new
    return Edited(facts, questions)


def scores_on(
    task: Task,
    model: EditParams,
    requests: Sequence[EditRequest],
    edited: Edited,
    known: UneditedAnswers,
    before: EditParams | None = None,
) -> list[dict[str, Any]]:
    """Teacher-forced scores of records on a model, rows as of `evaluate_together`.

    Args:
        edited: What the model's records edit, by which a probe about that is judged.
        known: Store of the unedited model's answers.
        before: Parameters of the model that it is compared with; None: the unedited model.
    """
    rows = []
    for start in range(0, len(requests), _SCORED_AT_ONCE):
        part = [judged_by_edits(request, edited) for request in requests[start : start + _SCORED_AT_ONCE]]
        _, evaluation = encode_requests(task.backbone, part, task.template, task.editor.sites)
        rows += evaluate_together(task.backbone, task.editor, model, evaluation, _TEACHER_FORCED, known, before)
    return rows
