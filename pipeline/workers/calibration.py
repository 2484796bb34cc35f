"""Measurements before the first edit: the kernel's bandwidth, and the statistics that an editor measures itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from odedit.backbones import Backbone
from odedit.data.pool import image_names, normal, scored_prompts
from odedit.data.records import RawRecord
from odedit.errors import InputError
from odedit.inputs.batch import REPHRASE_SLOTS, EditRequest
from odedit.inputs.prompts import Template
from odedit.objectives import CALIBRATION_STATES, calibrate
from odedit.objectives.base import Positions
from pipeline.run_folder import staging
from pipeline.run_folder.workspace import read_json
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Preparer

CALIBRATION_RECORDS = 64
_measured: dict[Any, dict[str, Any]] = {}
"""Bandwidths that this process has measured for earlier runs."""


@dataclass(frozen=True)
class Calibration:
    """The measurements of one run; records of the pool are measured if there is one, else the run's own.

    Args:
        job: The run.
        backbone: The model, before any edit.
        template: The run's template, which lays the records out as sequences.
    """

    job: Job
    backbone: Backbone
    template: Template

    def bandwidth(self) -> float | None:
        """sigma_0^2 of the kernel, measured once per run and shared by all workers through a file.

        Returns:
            None if the objective needs no measurement.

        Raises:
            InputError: No record can be used.
        """
        job, config, file = self.job, self.job.config, self.job.workspace.calibration
        positions = config.objective.settings.calibrated_positions
        if positions is None:
            return None
        if not file.exists():
            rephrases = replace(config.supervision, locality_source="record", near_locality=False)
            files = tuple(job.sources.identity().items())
            key = (files, config.data, config.backbone, rephrases, positions, job.device)
            if key not in _measured:
                _measured[key] = self._measure(positions)
            # The first worker's value counts for all, whatever kind of machine it runs on.
            file.write_once(json.dumps(_measured[key], indent=2) + "\n")
        return float(read_json(file)["sigma2_0"])

    def unscored_requests(self) -> list[EditRequest]:
        """Requests of the pool that share no picture and no scored text question with the run's records.

        An editor's own measurements on them enter its edits, so they must show nothing that the run is scored on;
        `Pool.candidates` has the same rule for a single record.

        Returns:
            An empty list if there is no pool, or all of its records share something.

        Raises:
            InputError: None of the remaining records can be used.
        """
        pool = staging.read_pool(self.job.workspace, self.job.sources)
        if pool is None:
            return []
        prompts: set[str] = set()
        images: set[str] = set()
        for record in staging.usable_records(self.job.workspace.records):
            prompts |= scored_prompts(record)
            images |= image_names(record)
        others = [
            record
            for record in pool.records
            if normal(record.fields["loc"]) not in prompts and not images & image_names(record)
        ]
        return self._requests(others, "data.pool") if others else []

    def _measure(self, positions: Positions) -> dict[str, Any]:
        """The bandwidth and what it was measured on, as `calibration.json` has them."""
        pool = staging.read_pool(self.job.workspace, self.job.sources)
        records = pool.records if pool else staging.usable_records(self.job.workspace.records)
        setting = "data.pool" if pool else "data.path"
        requests = self._requests(records, setting)
        try:
            value = calibrate(self.backbone, requests, self.template, positions)
        except ValueError as error:
            raise InputError(f"{setting}: {error} Use other records, or set objective.sigma2_0.") from error
        return {
            "sigma2_0": value,
            "records": len(requests),
            "states": min(sum(self._num_states(request, positions) for request in requests), CALIBRATION_STATES),
            "source": "pool" if pool else "records",
        }

    def _requests(self, records: Iterable[RawRecord], setting: str) -> list[EditRequest]:
        """The first requests that the model takes.

        Args:
            setting: Name of the setting that the records come from.

        Raises:
            InputError: No record can be used.
        """
        problems: list[str] = []
        usable = filter(self._fits, Preparer(self.job).calibration_requests(records, problems))
        requests = list(islice(usable, CALIBRATION_RECORDS))
        if not requests:
            reason = problems[0] if problems else "there is none that the model takes."
            raise InputError(f"{setting}: no calibration record can be used; first: {reason}")
        return requests

    def _fits(self, request: EditRequest) -> bool:
        """Whether the model takes every sequence of a request; one that is too long fails when it is edited."""
        try:
            sequences = [
                self.backbone.sequence(probe, self.template) for probe in (request.edit, *request.supervision.values())
            ]
        except ValueError:  # a target without a token
            return False
        return all(len(sequence.tokens) <= self.backbone.max_positions for sequence in sequences)

    def _num_states(self, request: EditRequest, positions: Positions) -> int:
        """Number of states that `odedit.objectives.calibrate` takes from one request."""
        slots = [slot for slot in REPHRASE_SLOTS if slot in request.supervision]
        total = 0
        for probe in (request.edit, *(request.supervision[slot] for slot in slots)):
            sequence = self.backbone.sequence(probe, self.template)
            first = sequence.first_target
            total += len(sequence.tokens) - first if positions == "target" else first - len(sequence.image)
        return total
