"""A trial as Ray Tune runs it: one step is one rung, and the result files are the checkpoint.

A worker keeps its model, image features and prepared requests for its next trial. Every group of edits is written as
soon as it is done, so a trial that is resumed, by another worker or after the search was killed, goes on after its last
group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.tune import Trainable

from odedit.errors import InputError
from odedit.storage.location import Location
from pipeline.config.run import from_dict
from pipeline.run_folder import rows
from pipeline.run_folder.workspace import read_json, write_json
from pipeline.study.spec import merged
from pipeline.workers.editor import EditActor
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Preparer
from pipeline.workers.request_cache import RequestCache
from tune import scoring
from tune.rungs import TrialWorkspace
from tune.space import nested

EDITS, JUDGED = "edits", "judged"
"""Keys of every result: number of edits, and the figure that decides whether the trial goes on."""
_REQUESTS = RequestCache()


class EditTrial(Trainable):
    """Edits the validation records with one point's settings, rung by rung."""

    def setup(
        self,
        config: Mapping[str, Any],
        job: Job,
        rungs: Sequence[Sequence[int]],
        sizes: Sequence[int],
        folder: Location,
        judged_by: str,
    ) -> None:
        """Starts the trial.

        Args:
            config: `key` and `settings` (path -> value) of the point.
            job: Run of the default settings on the validation records.
            rungs: Group numbers of each rung.
            sizes: Number of edits at each rung.
            folder: Folder of the search.
            judged_by: Figure that decides whether a trial goes on.
        """
        self._base, self._rungs, self._sizes, self._folder = job, rungs, sizes, folder
        self._judged_by = judged_by
        self._begin(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Starts the trial of the next point in this process, with the loaded model."""
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._key, self._settings = config["key"], config["settings"]
        workspace = TrialWorkspace(self._folder / "trials" / self._key, self._folder / "validation")
        workspace.create()
        self._workspace = workspace
        self._workers: tuple[Preparer, EditActor] | None = None
        self._done = sum(read_json(workspace.rung(index)) is not None for index in range(len(self._rungs)))
        # The last finished rung may not have reached scheduler and sampler: report it again.
        self._repeat = self._done > 0

    def step(self) -> dict[str, Any]:
        """Finishes the next rung. Wrong settings end the trial: another worker would refuse them as well."""
        try:
            report = self._report()
        except InputError as error:
            return {"error": str(error), EDITS: 0, JUDGED: 0.0, "done": True}
        is_last = self._done == len(self._rungs)
        failed = report["failed"] == report["edits"]
        return {
            EDITS: report["edits"],
            JUDGED: report.get(self._judged_by, 0.0),
            "report": json.dumps(report),
            "error": self._first_error() if failed else "",
            "done": is_last or failed,
        }

    def _report(self) -> scoring.Report:
        if self._repeat:
            self._repeat = False
            return dict(read_json(self._workspace.rung(self._done - 1)))
        for group in self._rungs[self._done]:
            if not self._workspace.part(group).exists():
                self._edit(group)
        report = scoring.report(self._rows(), self._sizes[self._done])
        write_json(self._workspace.rung(self._done), report)
        self._done += 1
        return report

    def _edit(self, group: int) -> None:
        if self._workers is None:
            values = merged(self._base.config.to_dict(), nested(self._settings))
            job = replace(self._base, config=from_dict(values), workspace=self._workspace)
            self._workers = Preparer(job, _REQUESTS), EditActor(job)
        preparer, actor = self._workers
        actor(preparer(group))

    def _rows(self) -> list[rows.Row]:
        groups = [group for rung in self._rungs[: self._done + 1] for group in rung]
        return list(rows.read_rows(self._workspace.part(group) for group in groups))

    def _first_error(self) -> str:
        error = next((row["error"] for row in rows.read_rows(rows.parts(self._workspace)) if row["error"]), "")
        return f"none of the edits worked; first: {error}"

    def cleanup(self) -> None:
        self._workers = None
