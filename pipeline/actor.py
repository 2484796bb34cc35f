"""The stateful worker: holds the model, edits one group at a time, and writes what comes of it.

It is the durable sink. A group's result file appears at once and whole, after the files of its edits, so what is there
is finished and what is not is done again, with the same outcome.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from odedit import editors
from odedit.backbones import encode_requests, load_backbone
from odedit.checkpoint import EditInfo, save_edit
from odedit.editing import EditResult, edit
from odedit.edits import EditRequest
from odedit.metrics import evaluate, stack_params
from odedit.mmedit import RawRecord
from odedit.objective import CALIBRATION_STATES, Objective, calibrate
from odedit.prompts import find_template
from pipeline import results, staging
from pipeline.attempts import Ledger
from pipeline.prepare import Prepared, Preparer, located, one_sentence, write_traceback
from pipeline.spec import Job
from pipeline.workspace import read_json, write_once

CALIBRATION_RECORDS = 64
_CALIBRATION_SLOTS = ("text_rephrase", "image_rephrase")


class EditActor:
    """Edits groups with one backbone, editor and objective."""

    def __init__(self, job: Job) -> None:
        """Raises InputError if the checkpoint, the editor's site or another setting does not fit the model."""
        torch.set_num_threads(job.num_threads)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._job = job
        config = job.config
        self._template = find_template(config.data.template)
        self._editor = editors.find(config.editor.name)(config.editor.settings)
        self._backbone = load_backbone(
            config.backbone.family, config.backbone.checkpoint, dtype=config.backbone.dtype, device=job.device
        )
        for site in self._editor.sites:
            self._backbone.site(site)
        self._objective = Objective(config.objective, self._bandwidth())

    def __call__(self, prepared: Prepared) -> list[results.Row]:
        """Edits a group and writes its results, unless they are there; returns the columns that progress shows."""
        part = self._job.workspace.part(prepared.group)
        if not part.exists():
            rows = sorted([*prepared.rows, *self._rows(prepared)], key=lambda row: int(row["index"]))
            results.write_part(part, rows)
            self._ledger(prepared.group).close()
        return [
            {name: row.get(name) for name in results.PROGRESS_COLUMNS}
            for row in results.read_rows([part], results.PROGRESS_COLUMNS)
        ]

    def _ledger(self, group: int) -> Ledger:
        path = self._job.workspace.attempts / f"group-{group:06d}.json"
        return Ledger(path, self._job.config.pipeline.max_attempts)

    def _rows(self, prepared: Prepared) -> list[results.Row]:
        if not prepared.requests:
            return []
        ledger = self._ledger(prepared.group)
        if ledger.begin_whole():
            try:
                return self._edit_within_memory(prepared.records, prepared.requests)
            except Exception:
                # Which edit it was shows when each is alone.
                write_traceback(self._job, f"group-{prepared.group:06d}")
        return [
            self._edit_alone(record, request, ledger)
            for record, request in zip(prepared.records, prepared.requests, strict=True)
        ]

    def _edit_alone(self, record: RawRecord, request: EditRequest, ledger: Ledger) -> results.Row:
        if not ledger.begin_single(record.edit_id):
            tries = ledger.attempts(record.edit_id)
            message = (
                f"given up: its worker died in each of {tries} attempts (out of memory, or a crash in native code)."
            )
            return results.base_row(record, self._job.config, results.FAILED, located(record, message))
        try:
            row = self._edit_within_memory([record], [request])[0]
        except Exception as error:
            write_traceback(self._job, record.edit_id)
            message = located(record, one_sentence(error))
            row = results.base_row(record, self._job.config, results.FAILED, message)
        # Not in a `finally`: a worker that is being ended has not survived this edit.
        ledger.end_single(record.edit_id)
        return row

    def _edit_within_memory(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[results.Row]:
        """Edits together, or in halves where memory does not suffice."""
        try:
            return self._edit(records, requests)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if len(requests) == 1 or not _is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback would keep the tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(requests) // 2
        first = self._edit_within_memory(records[:middle], requests[:middle])
        return first + self._edit_within_memory(records[middle:], requests[middle:])

    def _edit(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[results.Row]:
        config = self._job.config
        supervision, evaluation = encode_requests(self._backbone, requests, self._template)
        edited = edit(self._backbone, self._editor, self._objective, supervision, config.stopping, config.seed)
        params = stack_params([result.params for result in edited])
        scores = evaluate(self._backbone, self._editor, params, evaluation, config.evaluation)
        rows = []
        for record, result, score in zip(records, edited, scores, strict=True):
            row = self._row(record, result) | ({} if result.error else score)
            if not result.error:
                self._save(record, result, score)
            rows.append(row)
        return rows

    def _row(self, record: RawRecord, result: EditResult) -> results.Row:
        error = None if result.error is None else located(record, result.error)
        multipliers = result.curves.get("lambda", [])
        return results.base_row(record, self._job.config, results.FAILED if error else results.EDITED, error) | {
            "steps": result.steps,
            "stop_reason": result.stop_reason,
            "seconds": result.seconds,
            "lambda": multipliers[-1] if multipliers else None,
            "losses": result.curves,
        }

    def _save(self, record: RawRecord, result: EditResult, score: dict[str, Any]) -> None:
        config = self._job.config
        info = EditInfo(
            edit_id=record.edit_id,
            editor=config.editor.name,
            editor_config=asdict(config.editor.settings),
            family=config.backbone.family,
            checkpoint=config.backbone.checkpoint,
            fingerprint=self._backbone.fingerprint,
            template=config.data.template,
            prompt=record.fields["src"],
            target=record.fields["alt"],
            metrics=dict(score),
        )
        save_edit(self._job.workspace.edit(record.edit_id), result.params, info)

    def _bandwidth(self) -> float | None:
        """sigma_0^2, measured once per run and shared by all workers through a file."""
        config, path = self._job.config, self._job.workspace.calibration
        if not config.objective.needs_bandwidth or config.objective.sigma2_0 is not None:
            return config.objective.sigma2_0
        if not path.exists():
            pool = staging.read_pool(self._job.workspace, self._job.sources)
            records = pool.records if pool else staging.first_usable(self._job.workspace.records, CALIBRATION_RECORDS)
            requests = Preparer(self._job).requests(records[:CALIBRATION_RECORDS])
            bare = [
                replace(request, probes={}, supervision=_only(request.supervision, _CALIBRATION_SLOTS))
                for request in requests
            ]
            value = calibrate(self._backbone, bare, self._template, config.objective.positions)
            measured = {
                "sigma2_0": value,
                "records": len(bare),
                "states": CALIBRATION_STATES,
                "source": "pool" if pool else "records",
            }
            # The first worker's value counts for all, whatever kind of machine it runs on.
            write_once(path, json.dumps(measured, indent=2) + "\n")
        return float(read_json(path)["sigma2_0"])


def _only(probes: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: probes[name] for name in names if name in probes}


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
