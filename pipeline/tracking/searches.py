"""The MLflow runs of a search: a parent run, and a nested run for every trial.

The driver logs once per rung of a trial, so workers need no access to the store. Trials' runs are looked up by
their tags, so a killed search continues its existing runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from odedit.errors import in_words
from odedit.runtime.addresses import masked
from odedit.storage.location import Location
from pipeline.run_folder.curves import Curve
from pipeline.tracking import names, origin
from pipeline.tracking.client import Store, Tracker, TrackingError, status_after

_COMMAND = "tune"
KIND, SEARCH, POINT, NUMBER, STATE = "odedit.kind", "odedit.search", "odedit.point", "odedit.trial", "odedit.state"
Rungs = Mapping[int, Mapping[str, float]]
"""Edits -> metric -> value."""
_log = logging.getLogger(__name__)


@dataclass
class SearchRun:
    """The runs of a search and its trials.

    Attributes:
        store: MLflow store of all of them.
        search_id: Tag that all of them have.
        experiment: Id of the experiment.
        parent: Run of the search itself.
        trials: Runs of the trials, by the key of their points.
        failed: Reason of the first failed write; None without one. The search goes on; `check` raises at its end.
    """

    store: Store
    search_id: str
    experiment: str
    parent: Tracker
    trials: dict[str, Tracker] = field(default_factory=dict)
    failed: str | None = None

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        name: str,
        search_id: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None,
    ) -> SearchRun:
        """Continues the run of that id, else the run with the search's tags, else creates a run.

        Args:
            experiment: Name of the experiment.
            parameters: Parameters of the search's run.
            tags: Tags of the search's run, if it is created.

        Raises:
            InputError: The store cannot be reached, or the experiment was deleted.
        """
        store = Store.open(uri)
        parent = Tracker.resume(store, run_id)
        if parent is not None:
            experiment_id = str(store.run(parent.run_id).info.experiment_id)
        else:
            experiment_id = store.experiment(experiment)
            # The search may have been killed before it stored the run's id.
            matches = _runs_of(store, experiment_id, search_id, "search")
            parent = Tracker.resume(store, matches[0].info.run_id if matches else None)
        if parent is None:
            own = origin.tags(_COMMAND) | {KIND: "search", SEARCH: search_id}
            parent = Tracker.create(store, experiment_id, name, dict(tags) | own)
        parent.log_missing_values(parameters)
        children = _runs_of(store, experiment_id, search_id, "trial")
        trials = {run.data.tags[POINT]: Tracker(store, run.info.run_id) for run in children}
        return cls(store, search_id, experiment_id, parent, trials)

    def _try(self, call: Callable[[], None]) -> None:
        """Calls `call`, and stores an error in `failed`: an outage of the store must not end a search."""
        try:
            call()
        except Exception as error:
            if self.failed is None:
                self.failed = in_words(error)
                _log.warning("MLflow cannot be written to for now: %s", self.failed)

    def open_trial(self, key: str, number: int, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Reopens the run of a point, or creates it."""

        def call() -> None:
            if key in self.trials:
                self.trials[key].reopen()
                self.trials[key].log_missing_values(parameters)
                return
            own = origin.tags(_COMMAND) | {KIND: "trial", SEARCH: self.search_id, POINT: key, NUMBER: str(number)}
            self.trials[key] = Tracker.create(
                self.store, self.experiment, f"trial {number}", dict(tags) | own, self.parent.run_id
            )
            self.trials[key].log_values(parameters)

        self._try(call)

    def log_rungs(self, key: str, rungs: Rungs) -> None:
        """Logs a trial's metrics at the rungs that have none yet."""
        self._try(lambda: self._log_rungs(key, rungs))

    def _log_rungs(self, key: str, rungs: Rungs) -> None:
        logged = self.trials[key].logged_steps(names.TRIED)
        for edits, values in rungs.items():
            if edits not in logged:
                self.trials[key].log_points(names.at_step(names.of_trial(values), edits))

    def close_trial(
        self,
        key: str,
        state: str,
        rungs: Rungs,
        tags: Mapping[str, str],
        curves: Mapping[str, Curve],
        error: str = "",
    ) -> None:
        """Ends a trial's run: FAILED if its state is `failed`, else FINISHED.

        Args:
            rungs: All rungs of the trial; the missing ones are logged.
            curves: Losses by name.
            error: Reason of a failure.
        """

        def call() -> None:
            self._log_rungs(key, rungs)
            run = self.trials[key]
            run.log_points(names.of_curves(curves))
            if error:
                run.describe(error)
            run.set_tags({STATE: state} | dict(tags))
            run.close(_status(state))

        self._try(call)

    def is_closed(self, key: str) -> bool:
        """Whether a trial's run has its final state and status; False if the store does not answer.

        An interrupt between the two writes leaves a state without its status.
        """
        runs: list[Any] = []
        if key in self.trials:
            self._try(lambda: runs.append(self.store.run(self.trials[key].run_id)))
        return any(STATE in run.data.tags and run.info.status == _status(run.data.tags[STATE]) for run in runs)

    def check(self) -> None:
        """Raises TrackingError if a write has failed since `failed` was last set to None."""
        if self.failed is not None:
            raise self._error(self.failed)

    def _error(self, reason: str) -> TrackingError:
        return TrackingError(
            f"MLflow at {masked(self.store.uri)} could not be written to ({reason}). The search is complete; the same "
            "command logs it once it can."
        )

    def tag_run(self, run_id: str | None, tags: Mapping[str, str]) -> None:
        """Tags a run, and links it to the search."""
        if run_id is not None:
            self._try(lambda: Tracker(self.store, run_id).set_tags({SEARCH: self.search_id} | dict(tags)))

    def log_search(
        self, files: Iterable[Location], metrics: Mapping[str, float], tags: Mapping[str, str], markdown: str
    ) -> None:
        """Logs the results of the search to its parent run.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        try:
            self.parent.log_points(names.at_step(metrics))
            self.parent.describe(markdown)
            self.parent.set_tags(tags)
            for file in files:
                self.parent.log_file(file)
        except Exception as error:
            raise self._error(in_words(error)) from error

    def end(self, error: BaseException | None = None) -> None:
        """Closes the parent run and, after an error, the open trials, as FINISHED, FAILED or KILLED."""
        status = status_after(error)
        self.parent.finish(status, error)
        if error is None:
            return

        def close() -> None:
            for run in _runs_of(self.store, self.experiment, self.search_id, "trial"):
                if run.info.status == "RUNNING":
                    Tracker(self.store, run.info.run_id).finish(status)

        self._try(close)


def _status(state: str) -> str:
    """MLflow's status of a trial that ended in that state."""
    return "FAILED" if state == "failed" else "FINISHED"


def _runs_of(store: Store, experiment: str, search_id: str, kind: str) -> list[Any]:
    """MLflow's records of a search's runs of one kind, oldest first."""
    return store.search(experiment, f"tags.`{SEARCH}` = '{search_id}' and tags.`{KIND}` = '{kind}'")
