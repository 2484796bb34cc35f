"""The stateful worker: holds the model, edits one group at a time, and writes what comes of it.

It is the durable sink. A group's result file appears at once and whole, after the files of its edits, so what is there
is finished and what is not is done again, with the same outcome.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from safetensors import SafetensorError

from odedit import editors, objectives
from odedit.backbones import Backbone, encode_requests
from odedit.data.fields import edit_text
from odedit.data.negatives import NegativePool
from odedit.data.packed import is_pack_reference
from odedit.data.pool import image_names, normal, scored_prompts
from odedit.data.records import RawRecord
from odedit.data.supervision import rephrase_distance
from odedit.editing.curves import EditResult
from odedit.editing.files import EditInfo, save_edit
from odedit.editing.loop import edit
from odedit.editors.base import Measuring
from odedit.errors import InputError, one_sentence
from odedit.evaluation.scores import evaluate
from odedit.inputs.batch import REPHRASE_SLOTS, EditBatch, EditRequest, stack_params
from odedit.inputs.prompts import find_template
from odedit.objectives import CALIBRATION_STATES, calibrate
from odedit.objectives.base import Objective, Positions
from odedit.runtime import cuda_graphs
from odedit.runtime.addresses import masked
from odedit.runtime.peak_memory import peak_memory
from odedit.runtime.process import settle
from odedit.runtime.stages import stage
from pipeline.config.run import BackboneConfig
from pipeline.run_folder import rows as results
from pipeline.run_folder import staging
from pipeline.run_folder.workspace import read_json
from pipeline.workers.attempts import Ledger
from pipeline.workers.model import load_remembering, warn_anew
from pipeline.workers.negatives import negative_pool
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Prepared, Preparer, located, write_note, write_traceback
from pipeline.workers.profile import LOADING
from pipeline.workers.width import Room

CALIBRATION_RECORDS = 64
MEASURED_STEPS = 3
_OUT_OF_MEMORY = ("can't allocate memory", "cuda error: out of memory", "cublas_status_alloc_failed")


class EditActor:
    """Edits groups with one backbone, editor and objective."""

    def __init__(self, job: Job) -> None:
        """Raises InputError if the checkpoint, the editor's site or another setting does not fit the model."""
        settle(job.num_threads, job.device)
        self._job = job
        config = job.config
        self._template = find_template(config.data.template)
        self._editor = editors.find(config.editor.name)(config.editor.settings)
        self._backbone = _load(job)
        self._editor.check(self._backbone)
        self._room = Room(config.pipeline.at_once, job.device, job.memory_share)
        self._lazy_objective: Objective | None = None
        self._negatives: NegativePool | None = None
        self._is_measured = not isinstance(self._editor, Measuring)

    def __call__(self, prepared: Prepared) -> list[results.Row]:
        """Edits a group and writes its results, unless they are there; returns the columns that progress shows.

        Raises:
            OSError: Results cannot be written: no edit is to blame, and the run can go on later.
            InputError: The kernel's bandwidth cannot be measured.
        """
        part = self._job.workspace.part(prepared.group)
        rows: Iterable[results.Row]
        if part.exists():
            rows = results.read_rows([part], results.PROGRESS_COLUMNS)
        else:
            try:
                rows = sorted([*prepared.rows, *self._rows(prepared)], key=lambda row: int(row["index"]))
                with stage("write results"):
                    results.write_part(part, rows)
            except OSError:
                # This worker lives: what ends the run here must not count against the group's edits.
                self._ledger(prepared.group).close()
                raise
            self._ledger(prepared.group).close()
        return [{name: row.get(name) for name in results.PROGRESS_COLUMNS} for row in rows]

    def _ledger(self, group: int) -> Ledger:
        path = self._job.workspace.attempts / f"group-{group:06d}.json"
        return Ledger(path, self._job.config.pipeline.max_attempts)

    def _rows(self, prepared: Prepared) -> list[results.Row]:
        if not prepared.requests:
            return []
        with stage(LOADING):
            self._objective()  # what is wrong with the settings is not the first edits' fault
        ledger = self._ledger(prepared.group)
        if ledger.begin_whole():
            try:
                return self._edit_within_memory(prepared.records, prepared.requests)
            except OSError:
                raise
            except Exception as error:
                _end_if_device_is_lost(error)
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
        except OSError:
            raise
        except Exception as error:
            _end_if_device_is_lost(error)
            write_traceback(self._job, record.edit_id)
            message = located(record, one_sentence(error))
            row = results.base_row(record, self._job.config, results.FAILED, message)
        # Not in a `finally`: a worker that is being ended has not survived this edit.
        ledger.end_single(record.edit_id)
        return row

    def _edit_within_memory(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[results.Row]:
        """Edits a group; where memory does not suffice, fewer at once, or in the end the group in halves."""
        rows = _unless_out_of_memory(lambda: self._edit(records, requests), len(requests))
        if rows is not None:
            return rows
        if self._room.narrower(len(requests)):
            return self._edit_within_memory(records, requests)
        # Not the width was at fault, but what all edits of the group take: the next group may be as wide as before.
        self._room.restore()
        middle = len(requests) // 2
        first = self._edit_within_memory(records[:middle], requests[:middle])
        return first + self._edit_within_memory(records[middle:], requests[middle:])

    def _edit(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[results.Row]:
        config = self._job.config
        objective = self._objective()
        with stage("encode"):
            supervision, evaluation = self._encode(requests, self._negatives)
        width = self._room.width(len(requests), lambda: self._peak_bytes(objective, supervision, 1))
        # They are scored next; together they fit where they moved together.
        place = self._job.device if width >= len(requests) else "cpu"
        edited = edit(self._backbone, self._editor, objective, supervision, config.stopping, config.seed, width, place)
        memory = {}
        if config.pipeline.measure_memory:
            memory = {"peak_bytes": self._peak_bytes(objective, supervision, width) / width}
        scores = []
        with stage("evaluation"):
            for rows_E in torch.arange(len(edited)).split(width):
                scores += self._scores(edited, evaluation, rows_E)
        rows = []
        for record, request, result, score in zip(records, requests, edited, scores, strict=True):
            known = memory | {"rephrase_distance": rephrase_distance(request)}
            row = self._row(record, result) | known | ({} if result.error else score)
            if not result.error and config.keep_edits:
                with stage("write edits"):
                    self._save(record, request, result, score)
            rows.append(row)
        return rows

    def _scores(self, edited: Sequence[EditResult], evaluation: EditBatch, rows_E: torch.Tensor) -> list[Any]:
        """Of some edits together, or in halves where memory does not suffice: the edits themselves are made."""

        def scores() -> list[Any]:
            params = stack_params([edited[row].params for row in rows_E.tolist()])
            part = evaluation.take(rows_E.to(evaluation.tokens_EKS.device))
            return evaluate(self._backbone, self._editor, params, part, self._job.config.evaluation)

        found = _unless_out_of_memory(scores, len(rows_E))
        if found is not None:
            return found
        return [score for half in rows_E.chunk(2) for score in self._scores(edited, evaluation, half)]

    def _peak_bytes(self, objective: Objective, supervision: EditBatch, width: int) -> int:
        """The peak memory of the loop of so many edits, over its first steps: measuring takes time, which no edit's
        `seconds` shall hold, and no later step needs more than these do.
        """
        supervision = supervision.take(torch.arange(width, device=supervision.tokens_EKS.device))
        config = self._job.config
        limit = self._editor.max_steps if config.stopping.max_steps is None else config.stopping.max_steps
        stopping = replace(config.stopping, max_steps=min(MEASURED_STEPS, limit))
        with peak_memory(self._job.device) as peak:
            edit(self._backbone, self._editor, objective.without_warmup(), supervision, stopping, config.seed)
        return peak.bytes

    def _encode(
        self, requests: Sequence[EditRequest], negatives: NegativePool | None = None
    ) -> tuple[EditBatch, EditBatch]:
        return encode_requests(self._backbone, requests, self._template, self._editor.sites, negatives)

    def _row(self, record: RawRecord, result: EditResult) -> results.Row:
        error = None if result.error is None else located(record, result.error)
        multipliers = result.curves.get("lambda", [])
        return results.base_row(record, self._job.config, results.FAILED if error else results.EDITED, error) | {
            "steps": result.steps,
            "stop_reason": result.stop_reason,
            "seconds": result.seconds,
            "worst_nll": result.curves["worst_nll"][-1],
            "lambda": multipliers[-1] if multipliers else None,
            "penalty_steps": sum(value > 0 for value in multipliers),
            "losses": result.curves,
        }

    def _save(self, record: RawRecord, request: EditRequest, result: EditResult, score: dict[str, Any]) -> None:
        config, sources = self._job.config, self._job.sources
        picture, image = request.edit.picture, edit_text(record.fields, record.task).image
        root = sources.path if image is not None and is_pack_reference(image.path) else sources.image_root
        info = EditInfo(
            edit_id=record.edit_id,
            editor=config.editor.name,
            editor_config=asdict(config.editor.settings),
            family=config.backbone.family,
            checkpoint=config.backbone.checkpoint,
            fingerprint=self._backbone.fingerprint,
            template=config.data.template,
            prompt=request.edit.prompt,
            target=request.edit.target,
            metrics=dict(score),
            is_caption=request.edit.is_caption,
            picture="" if picture is None else picture.key,
            image="" if image is None else image.path,
            image_root=masked(root or ""),
        )
        try:
            save_edit(self._job.workspace.edit(record.edit_id), result.params, info)
        except SafetensorError as error:  # what a full disk looks like from there
            raise OSError(f"edit {record.edit_id} cannot be saved: {error}") from error

    def _objective(self) -> Objective:
        """Made for the first group that has something to edit: a run of unusable records has nothing to measure."""
        if self._lazy_objective is None:
            job, settings = self._job, self._job.config.objective.settings
            read_pool = partial(staging.read_pool, job.workspace, job.sources)
            self._negatives = negative_pool(settings, self._backbone, read_pool, self._editor.sites)
            self._lazy_objective = objectives.Objective(settings, self._bandwidth())
        if isinstance(self._editor, Measuring) and not self._is_measured:
            unscored = self._unscored()
            if unscored:  # else the editor makes do with what supervises each edit
                self._editor = self._editor.measured(self._backbone, self._encode(unscored)[0])
            self._is_measured = True
        return self._lazy_objective

    def _unscored(self) -> list[EditRequest]:
        """Requests of the pool that show nothing the run is scored on: what an editor measures, it edits by.

        None without a pool. Left out is what `Pool.candidates` leaves out for a single record: records that share a
        picture with one of the run's, or whose text question is one of those that are scored.

        Raises:
            InputError: No other record can be used.
        """
        pool = staging.read_pool(self._job.workspace, self._job.sources)
        if pool is None:
            return []
        prompts: set[str] = set()
        images: set[str] = set()
        for record in staging.usable_records(self._job.workspace.records):
            prompts |= scored_prompts(record)
            images |= image_names(record)
        others = [
            record
            for record in pool.records
            if normal(record.fields["loc"]) not in prompts and not images & image_names(record)
        ]
        return self._calibration_requests(others, "data.pool") if others else []

    def _unedited(self) -> tuple[list[EditRequest], str]:
        """Requests that are measured before any edit, of the pool if there is one, and the setting they are from.

        Raises:
            InputError: No record can be used.
        """
        pool = staging.read_pool(self._job.workspace, self._job.sources)
        records = pool.records if pool else staging.usable_records(self._job.workspace.records)
        setting = "data.pool" if pool else "data.path"
        return self._calibration_requests(records, setting), setting

    def _calibration_requests(self, records: Iterable[RawRecord], setting: str) -> list[EditRequest]:
        problems: list[str] = []
        usable = filter(self._fits, Preparer(self._job).calibration_requests(records, problems))
        requests = list(islice(usable, CALIBRATION_RECORDS))
        if not requests:
            first = problems[0] if problems else "there is none that the model takes."
            raise InputError(f"{setting}: no calibration record can be used; first: {first}")
        return requests

    def _fits(self, request: EditRequest) -> bool:
        """Whether the model takes what of a request is measured; one that it does not take fails when it is edited."""
        try:
            cells = [
                self._backbone.sequence(probe, self._template)
                for probe in (request.edit, *request.supervision.values())
            ]
        except ValueError:  # a target without a token
            return False
        return all(len(cell.tokens) <= self._backbone.max_positions for cell in cells)

    def _num_states(self, request: EditRequest) -> int:
        """How many states one request gives the measurement, as `odedit.objectives.calibrate` selects them."""
        probes = [request.edit, *(request.supervision[slot] for slot in REPHRASE_SLOTS if slot in request.supervision)]
        is_target = self._job.config.objective.settings.calibrated_positions == "target"
        total = 0
        for probe in probes:
            cell = self._backbone.sequence(probe, self._template)
            total += len(cell.tokens) - cell.first_target if is_target else cell.first_target - len(cell.image)
        return total

    def _bandwidth(self) -> float | None:
        """sigma_0^2, measured once per run and shared by all workers through a file."""
        config, path = self._job.config, self._job.workspace.calibration
        positions = config.objective.settings.calibrated_positions
        if positions is None:
            return None
        if not path.exists():
            job = self._job
            rephrases = replace(config.supervision, locality_source="record", near_locality=False)
            # Another run of this worker, with the same records and model, has measured the same.
            files = tuple(job.sources.identity().items())
            key = (files, config.data, config.backbone, rephrases, positions, job.device)
            if key not in _MEASURED:
                _MEASURED[key] = self._measure_bandwidth(positions)
            # The first worker's value counts for all, whatever kind of machine it runs on.
            path.write_once(json.dumps(_MEASURED[key], indent=2) + "\n")
        return float(read_json(path)["sigma2_0"])

    def _measure_bandwidth(self, positions: Positions) -> dict[str, Any]:
        requests, setting = self._unedited()
        try:
            value = calibrate(self._backbone, requests, self._template, positions)
        except ValueError as error:
            raise InputError(f"{setting}: {error} Use other records, or set objective.sigma2_0.") from error
        return {
            "sigma2_0": value,
            "records": len(requests),
            "states": min(sum(self._num_states(request) for request in requests), CALIBRATION_STATES),
            "source": "pool" if setting == "data.pool" else "records",
        }


_MEASURED: dict[Any, dict[str, Any]] = {}


_LOADED: dict[tuple[BackboneConfig, str, str | None], Backbone] = {}


def _load(job: Job) -> Backbone:
    """Kept for the next run of the same worker, which mostly edits the same model; never two at once.

    It keeps the features of the pictures used last, so the arms of a study share them.
    """
    key = (job.config.backbone, job.device, job.config.pipeline.feature_store)

    def warn(text: str) -> None:
        write_note(job, "feature-store", text)

    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = load_remembering(*key, warn=warn)
    else:
        warn_anew(_LOADED[key], warn)
    return _LOADED[key]


def _unless_out_of_memory(work: Callable[[], list[Any]], num_edits: int) -> list[Any] | None:
    """What it returns; None if memory ran out and fewer than so many edits may fit."""
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # What steps have been recorded holds the memory of another step.
        is_last_try = not cuda_graphs.forget()
        if is_last_try and num_edits == 1:
            raise
    # Outside of the handler, whose traceback would keep the tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None if is_last_try else _unless_out_of_memory(work, num_edits)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in text for part in _OUT_OF_MEMORY)


def _end_if_device_is_lost(error: BaseException) -> None:
    """Ends this process after an error that leaves the GPU unusable for it: every further edit would fail in its turn.

    A new worker takes the group again, and the ledger finds out which edit it was.
    """
    if "cuda error" in str(error).lower() and not _is_out_of_memory(error):
        os._exit(1)
