"""The MLflow runs of a search: a parent, and a nested run for every point that is tried.

The driver logs once per rung of a trial, so workers need no access to the store. A trial's run is found by its tags,
so a search that was killed at any moment continues the runs that it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from odedit.errors import in_words
from odedit.runtime.addresses import masked
from odedit.storage.location import Location
from pipeline.tracking.client import Store, Tracker, TrackingError

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
        failed: Reason why a write failed, or None. The search goes on without it; `check` raises in the end.
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
        """Continues the run of that id, else the one with the search's tags, else creates one.

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
            # A search that was killed before it stored the id is found by its tags.
            matches = _runs_of(store, experiment_id, search_id, "search")
            parent = Tracker.resume(store, matches[0].info.run_id if matches else None)
        if parent is None:
            parent = Tracker.create(store, experiment_id, name, dict(tags) | {KIND: "search", SEARCH: search_id})
        parent.log_missing_values(parameters)
        children = _runs_of(store, experiment_id, search_id, "trial")
        trials = {run.data.tags[POINT]: Tracker(store, run.info.run_id) for run in children}
        return cls(store, search_id, experiment_id, parent, trials)

    def _try(self, call: Callable[[], None]) -> None:
        """Calls; an error is kept in `failed`, since a store that is away for a while must not end a search."""
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
            own = {KIND: "trial", SEARCH: self.search_id, POINT: key, NUMBER: str(number)}
            self.trials[key] = Tracker.create(
                self.store, self.experiment, f"trial {number}", dict(tags) | own, self.parent.run_id
            )
            self.trials[key].log_values(parameters)

        self._try(call)

    def log_rungs(self, key: str, rungs: Rungs) -> None:
        """Logs a trial's metrics at the rungs that have none yet."""
        self._try(lambda: self._log_rungs(key, rungs))

    def _log_rungs(self, key: str, rungs: Rungs) -> None:
        logged = self.trials[key].logged_steps("edits")
        self.trials[key].log_points(
            (name, value, edits)
            for edits, values in rungs.items()
            if edits not in logged
            for name, value in values.items()
        )

    def close_trial(
        self,
        key: str,
        state: str,
        rungs: Rungs,
        tags: Mapping[str, str],
        curves: Mapping[str, Sequence[tuple[int, float]]],
    ) -> None:
        """Ends a trial's run: FAILED if its state is `failed`, else FINISHED.

        Args:
            rungs: All rungs of the trial; the missing ones are logged.
            curves: Steps and values by name.
        """

        def call() -> None:
            self._log_rungs(key, rungs)
            run = self.trials[key]
            run.log_curves(curves, "curves/")
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

    def log_search(self, files: Iterable[Location], metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Logs the results of the search to its parent run.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        try:
            self.parent.log_points((name, value, 0) for name, value in metrics.items())
            self.parent.set_tags(tags)
            for file in files:
                self.parent.log_file(file)
        except Exception as error:
            raise self._error(in_words(error)) from error

    def end(self, status: str) -> None:
        """Closes the parent, and the trials that are still open, as FINISHED, FAILED or KILLED."""
        self.parent.finish(status)
        if status == "FINISHED":
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
