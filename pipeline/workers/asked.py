"""Old answers of records that name none: what the unedited model says to their questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from odedit.backbones import Backbone
from odedit.evaluation.scores import answer_text
from odedit.inputs.batch import EditRequest
from odedit.inputs.prompts import Template
from odedit.ways.common.sequences import Features, own_answers


def with_old_answers(backbone: Backbone, template: Template, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests with `replaced`, the answer that hard negatives are weighed by, asked where the record has none.

    An answer that does not end within the limit of tokens is used as far as it goes.
    """
    unknown = [request for request in requests if request.replaced is None]
    if not unknown:
        return list(requests)
    features = Features(backbone)
    features.add(request.edit.picture for request in unknown if request.edit.picture is not None)
    sequences = [backbone.sequence(request.edit, template) for request in unknown]
    answers = own_answers(features, sequences)
    said = {
        request.edit_id: answer_text(backbone, answer.tokens).removesuffix(" ...").strip()
        for request, answer in zip(unknown, answers, strict=True)
    }
    return [replace(request, replaced=request.replaced or said[request.edit_id] or None) for request in requests]
