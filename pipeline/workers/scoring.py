"""The worker that scores records on a whole model, against the unedited one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from odedit.data.records import RawRecord
from odedit.evaluation.edited import judged_by_edits
from odedit.inputs.batch import EditRequest
from odedit.inputs.prompts import find_template
from odedit.runtime.peak_memory import peak_memory
from pipeline.run_folder import staging
from pipeline.run_folder.rows import EDITED, SKIPPED, Row, base_row
from pipeline.workers import output
from pipeline.workers.compared import Compared
from pipeline.workers.group import GroupWorker
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Prepared, located, write_note


class ScoreActor(GroupWorker):
    """Scores groups on one model. Its rows are those of `odedit edit`, with the model in place of each edit."""

    def __init__(self, job: Job) -> None:
        """Raises InputError if a model cannot be loaded, or the two do not fit together."""
        super().__init__(job)
        assert job.scored is not None, "the job names a model"
        self._scored, config = job.scored, job.config
        self._template = find_template(config.data.template)
        # Of a model that was not made by this run, the supervision is unknown.
        self._wanted = None if config.commit is None else staging.wanted(config, job.workspace, job.sources)
        self._models = Compared.load(
            config.backbone,
            self._scored,
            job.device,
            config.pipeline.feature_store,
            partial(write_note, job, "feature-store"),
        )

    def _load(self) -> None:
        return None

    def _left_out(self, prepared: Prepared) -> tuple[Prepared, list[Row]]:
        reasons = self._scored.left_out
        pairs = list(zip(prepared.records, prepared.requests, strict=True))
        kept = [(record, request) for record, request in pairs if record.index not in reasons]
        rows = [
            self._described(base_row(record, self._job.config, SKIPPED, located(record, reasons[record.index])))
            for record, _ in pairs
            if record.index in reasons
        ]
        records, requests = (tuple(part) for part in zip(*kept, strict=True)) if kept else ((), ())
        return replace(prepared, records=records, requests=requests), rows

    def _process(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[Row]:
        judged = [judged_by_edits(request, self._scored.edited) for request in requests]
        width = self._width_limit.width(len(judged), lambda: self._peak_bytes(judged[0]))
        scores = [row for start in range(0, len(judged), width) for row in self._scores(judged[start : start + width])]
        return [self._row(record) | score for record, score in zip(records, scores, strict=True)]

    def _scores(self, requests: Sequence[EditRequest]) -> list[Row]:
        return self._models.rows(requests, self._template, self._job.config.evaluation)

    def _peak_bytes(self, request: EditRequest) -> int:
        """Peak memory of scoring one record."""
        with peak_memory(self._job.device) as peak:
            self._scores([request])
        return peak.bytes

    def _row(self, record: RawRecord) -> Row:
        """The row without its scores."""
        row = self._described(base_row(record, self._job.config, EDITED))
        if self._wanted is not None:
            row |= output.origin_columns(record, self._job.config.supervision, self._wanted)
        fit = self._scored.fits.get(record.edit_id)
        if fit is None:
            return row
        return row | {"steps": fit.steps, "stop_reason": fit.stop_reason, "worst_nll": fit.worst_nll}

    def _described(self, row: Row) -> Row:
        return row | dict(self._scored.columns)
