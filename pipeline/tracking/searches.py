"""The MLflow runs of a search: a parent, and a child for every point that is tried.

The driver writes, once per rung of a trial: workers need no access to the store, and do not queue for it. A trial's run
is found again by its tags, so a search that was killed at any moment goes on with the runs it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from odedit.errors import in_words
from odedit.runtime.addresses import masked
from odedit.storage.location import Location
from pipeline.tracking import runs
from pipeline.tracking.locks import patiently
from pipeline.tracking.runs import PARENT_TAG, Tracker, TrackingError

KIND, SEARCH, POINT, NUMBER, STATE = "odedit.kind", "odedit.search", "odedit.point", "odedit.trial", "odedit.state"
_PAGE = 1000
Rungs = Mapping[int, Mapping[str, float]]
"""Edits -> metric -> value."""
_log = logging.getLogger(__name__)


@dataclass
class SearchRun:
    """The parent's run, and those of its trials.

    Attributes:
        client: Of MLflow.
        uri: The store.
        search_id: In the tag of every run of the search.
        experiment: Id.
        run_id: Of the parent.
        trials: Runs of the trials, by the key of their points.
        failed: Why something could not be written; the search goes on, and `check` tells in the end.
    """

    client: Any
    uri: str
    search_id: str
    experiment: str
    run_id: str
    trials: dict[str, str] = field(default_factory=dict)
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

        Raises:
            InputError: The store cannot be reached, or the experiment was deleted.
        """
        client = runs._client(uri)
        if run_id is None or not runs._exists(client, run_id):
            experiment_id = runs._experiment(client, uri, experiment)
            # A search that was killed before it could write the id down.
            found = _search(client, experiment_id, search_id, "search")
            run_id = found[0].info.run_id if found else None
        if run_id is not None:
            run = client.get_run(run_id)
            experiment_id = run.info.experiment_id
            patiently(client.update_run, run_id, status="RUNNING")
        else:
            own = dict(tags) | {KIND: "search", SEARCH: search_id}
            run = patiently(client.create_run, experiment_id, run_name=name, tags=own)
            run_id = run.info.run_id
        tracker = Tracker(client, uri, run_id)
        _log_missing(tracker, parameters)
        children = _search(client, experiment_id, search_id, "trial")
        trials = {run.data.tags[POINT]: run.info.run_id for run in children}
        return cls(client, uri, search_id, experiment_id, run_id, trials)

    @property
    def _parent(self) -> Tracker:
        return Tracker(self.client, self.uri, self.run_id)

    def _trial(self, key: str) -> Tracker:
        return Tracker(self.client, self.uri, self.trials[key])

    def _try(self, call: Callable[[], None]) -> None:
        """A store that is gone for a while must not end a search: what is missing is written at its end."""
        try:
            call()
        except Exception as error:
            if self.failed is None:
                self.failed = in_words(error)
                _log.warning("MLflow cannot be written to for now: %s", self.failed)

    def open_trial(self, key: str, number: int, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """The run of a point: a new one, or the one that it has."""

        def call() -> None:
            if key in self.trials:
                patiently(self.client.update_run, self.trials[key], status="RUNNING")
                _log_missing(self._trial(key), parameters)
                return
            own = {KIND: "trial", SEARCH: self.search_id, POINT: key, NUMBER: str(number), PARENT_TAG: self.run_id}
            run = patiently(self.client.create_run, self.experiment, run_name=f"trial {number}", tags=dict(tags) | own)
            self.trials[key] = run.info.run_id
            self._trial(key).log_values(parameters)

        self._try(call)

    def log_rungs(self, key: str, rungs: Rungs) -> None:
        """A trial's metrics after so many edits; those that are there stay."""
        self._try(lambda: self._log_rungs(key, rungs))

    def _log_rungs(self, key: str, rungs: Rungs) -> None:
        logged = {point.step for point in self.client.get_metric_history(self.trials[key], "edits")}
        self._trial(key).log_points(
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
            rungs: All of them; those that are missing are logged.
            curves: Steps and values by name.
        """

        def call() -> None:
            self._log_rungs(key, rungs)
            run = self._trial(key)
            run.log_points((f"curves/{name}", value, step) for name, curve in curves.items() for step, value in curve)
            run.set_tags({STATE: state} | dict(tags))
            patiently(self.client.set_terminated, run.run_id, status=_status(state))

        self._try(call)

    def is_closed(self, key: str) -> bool:
        """Whether a trial's run has its final state and status, as far as the store can be asked.

        An interrupt may have come between the two, and leaves the status of what was cut off.
        """
        found: list[Any] = []
        if key in self.trials:
            self._try(lambda: found.append(self.client.get_run(self.trials[key])))
        return any(STATE in run.data.tags and run.info.status == _status(run.data.tags[STATE]) for run in found)

    def check(self) -> None:
        """Raises TrackingError if something that was tried since `failed` was last None is missing."""
        if self.failed is not None:
            raise self._error(self.failed)

    def _error(self, reason: str) -> TrackingError:
        return TrackingError(
            f"MLflow at {masked(self.uri)} could not be written to ({reason}). The search is complete; the same "
            "command logs it once it can."
        )

    def tag_run(self, run_id: str | None, tags: Mapping[str, str]) -> None:
        """Links another run to the search."""
        if run_id is not None:
            self._try(lambda: Tracker(self.client, self.uri, run_id).set_tags({SEARCH: self.search_id} | dict(tags)))

    def log_search(self, files: Iterable[Location], metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """What the search found: metrics, tags, files.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        try:
            self._parent.log_points((name, value, 0) for name, value in metrics.items())
            self._parent.set_tags(tags)
            for file in files:
                with file.local_copy() as path:
                    patiently(self.client.log_artifact, self.run_id, str(path))
        except Exception as error:
            raise self._error(in_words(error)) from error

    def end(self, status: str) -> None:
        """Closes the parent, and the trials that are still open, as FINISHED, FAILED or KILLED."""
        self._parent.finish(status)
        if status == "FINISHED":
            return

        def close() -> None:
            for run in _search(self.client, self.experiment, self.search_id, "trial"):
                if run.info.status == "RUNNING":
                    Tracker(self.client, self.uri, run.info.run_id).finish(status)

        self._try(close)


def _status(state: str) -> str:
    """What a trial's run ends as in the store."""
    return "FAILED" if state == "failed" else "FINISHED"


def _log_missing(run: Tracker, parameters: Mapping[str, Any]) -> None:
    """A kill may have come before the parameters; those that are there stay as they were."""
    known = run.client.get_run(run.run_id).data.params
    run.log_values({name: value for name, value in parameters.items() if name not in known})


def _search(client: Any, experiment: str, search_id: str, kind: str) -> list[Any]:
    """Runs of a search that were not deleted, the oldest first."""
    query = f"tags.`{SEARCH}` = '{search_id}' and tags.`{KIND}` = '{kind}'"
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], query, max_results=_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda run: run.info.start_time)
