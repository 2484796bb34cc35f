"""The worker that edits: holds model, editor and objective.

A group's result file is written after the files of its edits, so a finished group has all its edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from odedit import editors, objectives
from odedit.backbones import encode_requests
from odedit.data.negatives import NegativePool
from odedit.data.records import RawRecord
from odedit.data.supervision import rephrase_distance
from odedit.editing.curves import EditResult
from odedit.editing.loop import edit
from odedit.editors.base import Measuring
from odedit.evaluation.scores import evaluate
from odedit.inputs.batch import EditBatch, EditRequest, stack_params
from odedit.inputs.prompts import find_template
from odedit.objectives.base import Objective
from odedit.runtime.peak_memory import peak_memory
from odedit.runtime.stages import stage
from pipeline.run_folder import staging
from pipeline.run_folder.rows import Row
from pipeline.workers import output
from pipeline.workers.asked import with_old_answers
from pipeline.workers.calibration import Calibration
from pipeline.workers.device_errors import unless_out_of_memory
from pipeline.workers.group import GroupWorker
from pipeline.workers.model import unedited_answers, worker_backbone
from pipeline.workers.negatives import negative_pool
from pipeline.workers.plan import Job
from pipeline.workers.preparer import write_note

MEASURED_STEPS = 3


class EditActor(GroupWorker):
    """Edits groups with one backbone, editor and objective."""

    def __init__(self, job: Job) -> None:
        """Raises InputError if the checkpoint, the editor's site or another setting does not fit the model."""
        super().__init__(job)
        config = job.config
        self._template = find_template(config.data.template)
        self._editor = editors.find(config.editor.name)(config.editor.settings)
        self._backbone = worker_backbone(
            config.backbone, job.device, config.pipeline.feature_store, partial(write_note, job, "feature-store")
        )
        self._editor.check(self._backbone)
        self._wanted = staging.wanted(config, job.workspace, job.sources)
        self._calibration = Calibration(job, self._backbone, self._template)
        self._lazy_objective: Objective | None = None
        self._negatives: NegativePool | None = None
        self._is_measured = not isinstance(self._editor, Measuring)

    def _load(self) -> None:
        self._objective()

    def _process(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[Row]:
        config = self._job.config
        objective = self._objective()
        if self._negatives is not None:
            requests = with_old_answers(self._backbone, self._template, requests)
        with stage("encode"):
            settings, read = config.objective.settings, requests
            if self._negatives is None:  # all pictures of a request are excluded from its hard negatives
                # Pictures that nothing reads do not pass the image tower.
                read = [request.reading(settings.reads(self._editor)) for request in requests]
            supervision, evaluation = self._encode(read, self._negatives, settings.joins_rephrases)
        width = self._width_limit.width(len(requests), lambda: self._peak_bytes(objective, supervision, 1))
        # If all edits fit the device at once, they stay there for the evaluation.
        device = self._job.device if width >= len(requests) else "cpu"
        edited = edit(self._backbone, self._editor, objective, supervision, config.stopping, config.seed, width, device)
        peak = {}
        if config.pipeline.measure_memory:
            peak = {"peak_bytes": self._peak_bytes(objective, supervision, width) / width}
        scores = []
        with stage("evaluation"):
            for rows_E in torch.arange(len(edited)).split(width):
                scores += self._scores(edited, evaluation, rows_E)
        rows = []
        for record, request, result, score in zip(records, requests, edited, scores, strict=True):
            measured = peak | {"rephrase_distance": rephrase_distance(request)}
            row = output.edit_row(self._job, record, result) | measured | ({} if result.error else score)
            row |= output.origin_columns(record, config.supervision, self._wanted)
            if not result.error and config.keep_edits:
                with stage("write edits"):
                    output.save(self._job, record, request, result, score, self._backbone.fingerprint)
            rows.append(row)
        return rows

    def _scores(self, edited: Sequence[EditResult], evaluation: EditBatch, rows_E: torch.Tensor) -> list[Any]:
        """Scores of the edits in these rows, evaluated together or, when memory runs out, in two halves."""

        def evaluated() -> list[Any]:
            params = stack_params([edited[row].params for row in rows_E.tolist()])
            part = evaluation.take(rows_E.to(evaluation.tokens_EKS.device))
            known = unedited_answers(self._backbone)
            return evaluate(self._backbone, self._editor, params, part, self._job.config.evaluation, known)

        scores = unless_out_of_memory(evaluated, len(rows_E))
        if scores is not None:
            return scores
        return [score for half in rows_E.chunk(2) for score in self._scores(edited, evaluation, half)]

    def _peak_bytes(self, objective: Objective, supervision: EditBatch, width: int) -> int:
        """Peak memory of the loop with `width` edits at once.

        Measured on the first steps of a loop of its own: later steps need no more memory, and measuring would slow
        the loop whose `seconds` are reported.
        """
        supervision = supervision.take(torch.arange(width, device=supervision.tokens_EKS.device))
        config = self._job.config
        limit = self._editor.max_steps if config.stopping.max_steps is None else config.stopping.max_steps
        stopping = replace(config.stopping, max_steps=min(MEASURED_STEPS, limit))
        with peak_memory(self._job.device) as peak:
            edit(self._backbone, self._editor, objective.without_warmup(), supervision, stopping, config.seed)
        return peak.bytes

    def _encode(
        self, requests: Sequence[EditRequest], negatives: NegativePool | None = None, joined: bool = False
    ) -> tuple[EditBatch, EditBatch]:
        return encode_requests(self._backbone, requests, self._template, self._editor.sites, negatives, joined)

    def _objective(self) -> Objective:
        """The objective, built and calibrated at the first call: without usable records nothing can be measured."""
        if self._lazy_objective is None:
            job, settings = self._job, self._job.config.objective.settings
            read_pool = partial(staging.read_pool, job.workspace, job.sources)
            self._negatives = negative_pool(settings, self._backbone, read_pool, self._editor.sites)
            self._lazy_objective = objectives.Objective(settings, self._calibration.bandwidth())
        if isinstance(self._editor, Measuring) and not self._is_measured:
            requests = self._calibration.unscored_requests()
            if requests:  # else the editor measures the supervision of each edit
                self._editor = self._editor.measured(self._backbone, self._encode(requests)[0])
            self._is_measured = True
        return self._lazy_objective
