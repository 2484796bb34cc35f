"""A few facts of the embedded world, edited alone, as the task of a way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from odedit import EditRequest, ImageReader, Objective, ObjectiveConfig, Stopping, edit, encode_requests, stack_params
from odedit.backbones import Backbone
from odedit.data.pool import Pool
from odedit.data.records import read_records
from odedit.data.supervision import Supervision, build_request
from odedit.editors.base import Editor, Trace
from odedit.inputs.batch import EditBatch, EditParams
from odedit.ways.base import Committed, Step, Task, Way
from tests.support.requests import TEMPLATE


def requests_of(paths: Mapping[str, Path], split: str, count: int) -> list[EditRequest]:
    """Requests of a split of the embedded world, one per fact."""
    reader = ImageReader(str(paths["images"]), str(paths["images_rephrase"]))
    pool = Pool.sample(str(paths["train"]), reader)
    firsts = {str(record.fields["fact"]): record for record in list(read_records(str(paths[split])))[::-1]}
    chosen = list(firsts.values())[::-1][:count]
    return [build_request(record, reader, Supervision(), pool) for record in chosen]


def task_of(backbone: Backbone, editor: Editor, requests: list[EditRequest], pool: list[EditRequest]) -> Task:
    """The task of committing edits that are made here, each alone, by the likelihood."""
    supervision, _ = encode_requests(backbone, requests, TEMPLATE, editor.sites)
    objective = Objective(ObjectiveConfig(name="native"))
    results = edit(backbone, editor, objective, supervision, Stopping(60, worst_token_nll=0.05))
    edits = stack_params([result.params for result in results])
    return Task(backbone, TEMPLATE, editor, objective, requests, pool, edits=edits)


class Whole:
    """An editor for `evaluate`, which gives each edit its own parameters: applies the whole model instead."""

    def __init__(self, serving: Editor, params: EditParams) -> None:
        self._serving, self._params = serving, params
        self.sites, self.positionwise = serving.sites, serving.positionwise

    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> AbstractContextManager[Trace]:
        return self._serving.together(backbone, self._params, batch)


def finish(way: Way, task: Task) -> tuple[Committed, list[Step]]:
    """Result and steps of a way."""
    steps: list[Step] = []
    run: Any = way.commit(task)
    while True:
        try:
            steps.append(next(run))
        except StopIteration as stop:
            return stop.value, steps
