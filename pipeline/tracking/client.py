"""All calls of MLflow's client: experiments, runs and their artifacts.

Only the driver logs, in few large calls: many small writes by workers would queue for the database.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from odedit.errors import Explained, in_words, one_sentence
from odedit.runtime.addresses import masked
from odedit.storage.location import Location
from pipeline.config.values import masked_values
from pipeline.interrupts import interrupts_delayed
from pipeline.tracking import experiments
from pipeline.tracking.connection import check_experiment, connect, database_file
from pipeline.tracking.locks import patiently

METRICS_PER_CALL = 1000
PARAMETERS_PER_CALL = 100
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"
LONGEST_TAG = 5000
_RUNS_PER_PAGE = 1000
_log = logging.getLogger(__name__)


class TrackingError(Explained, RuntimeError):
    """MLflow could not be written to; the results themselves are complete on disk."""


@dataclass(frozen=True)
class Store:
    """An MLflow store, with its experiments, runs and artifacts.

    Attributes:
        uri: Address of the tracking server or database.
        client: The store's MlflowClient.
    """

    uri: str
    client: Any

    @classmethod
    def open(cls, uri: str) -> Self:
        """Connects to the store, creating a database that does not exist. Raises InputError if it cannot be used."""
        return cls(uri, connect(uri))

    def experiment(self, name: str) -> str:
        """Id of an experiment of model training, created if there is none. Raises InputError if it was deleted."""
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            check_experiment(experiment, name)
            for tag, value in experiments.TAGS.items():
                if tag not in experiment.tags:
                    patiently(self.client.set_experiment_tag, experiment.experiment_id, tag, value)
            return str(experiment.experiment_id)
        database = database_file(self.uri)
        # MLflow's default is the working directory of the first writer.
        artifacts = None if database is None else (database.absolute().parent / "mlartifacts").as_uri()
        try:
            created = patiently(
                self.client.create_experiment, name, artifact_location=artifacts, tags=dict(experiments.TAGS)
            )
            return str(created)
        except Exception:
            # Another run may have created it in the meantime.
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return str(experiment.experiment_id)

    def run(self, run_id: str) -> Any:
        """MLflow's record of a run: info, parameters, metrics and tags."""
        return self.client.get_run(run_id)

    def has_run(self, run_id: str) -> bool:
        """Whether the store has the run and it was not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.run(run_id).info.lifecycle_stage == "active")
        except MlflowException:
            return False

    def search(self, experiment: str, query: str) -> list[Any]:
        """The experiment's runs that match, oldest first; deleted ones are left out."""
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([experiment], query, max_results=_RUNS_PER_PAGE, page_token=token)
            runs += page
            token = page.token
            if not token:
                return sorted(runs, key=lambda run: run.info.start_time)

    def artifacts(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of a run's files and folders in one folder of its artifacts."""
        return [item.path for item in self.client.list_artifacts(run_id, folder)]

    def download(self, run_id: str, path: str, folder: Path) -> Path:
        """Copies an artifact into a local folder; returns the copy."""
        return Path(self.client.download_artifacts(run_id, path, str(folder)))


@dataclass(frozen=True)
class Table:
    """A table, as MLflow's pages show it: a column whose first cell is a `picture_cell` has pictures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def picture_cell(path: str) -> dict[str, str]:
    """A table's cell with the picture in an artifact."""
    return {"type": "image", "filepath": path, "compressed_filepath": path}


FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


def status_after(error: BaseException | None) -> str:
    """Status of a run that was ended by an exception, an interrupt or nothing."""
    return FINISHED if error is None else KILLED if isinstance(error, KeyboardInterrupt) else FAILED


@dataclass(frozen=True)
class Tracker:
    """One MLflow run; every kind of run is created, resumed, written to and closed here."""

    store: Store
    run_id: str

    @classmethod
    def create(
        cls, store: Store, experiment: str, name: str, tags: Mapping[str, str], parent_run: str | None = None
    ) -> Self:
        """Creates a run, nested below `parent_run` if it is given.

        Args:
            experiment: Id of the experiment.
        """
        tags = dict(tags) | ({PARENT_TAG: parent_run} if parent_run else {})
        run = patiently(store.client.create_run, experiment, run_name=name, tags=tags)
        return cls(store, run.info.run_id)

    @classmethod
    @contextmanager
    def created(
        cls, store: Store, experiment: str, name: str, tags: Mapping[str, str], parent_run: str | None = None
    ) -> Iterator[Self]:
        """As `create`, for a block that logs what the run begins with; the run is closed if the block fails.

        Ctrl-C is delayed to the end of the block: no run is created of which nobody knows the id.
        """
        with interrupts_delayed():
            run = cls.create(store, experiment, name, tags, parent_run)
            try:
                yield run
            except BaseException as error:
                run.finish(status_after(error), error)
                raise

    @classmethod
    def resume(cls, store: Store, run_id: str | None) -> Self | None:
        """Reopens the run of that id; None if the store has no such run."""
        if run_id is None or not store.has_run(run_id):
            return None
        tracker = cls(store, run_id)
        tracker.reopen()
        return tracker

    def reopen(self) -> None:
        """Sets the status to RUNNING."""
        patiently(self.store.client.update_run, self.run_id, status="RUNNING")

    def log_values(self, values: Mapping[str, Any]) -> None:
        """Logs parameters, without secrets. A logged parameter cannot be changed in MLflow."""
        from mlflow.entities import Param

        parameters = iter([Param(key, str(masked_values(value))) for key, value in values.items()])
        while chunk := list(islice(parameters, PARAMETERS_PER_CALL)):
            self._write(self.store.client.log_batch, params=chunk)

    def log_missing_values(self, values: Mapping[str, Any]) -> None:
        """Logs the parameters that the run lacks, as after a kill between its creation and `log_values`."""
        logged = self.store.run(self.run_id).data.params
        self.log_values({name: value for name, value in values.items() if name not in logged})

    def log_points(self, points: Iterable[tuple[str, float, int]]) -> None:
        """Logs metrics, given as name, value and step."""
        from mlflow.entities import Metric

        now, remaining = int(time.time() * 1000), iter(points)
        while chunk := [Metric(name, value, now, step) for name, value, step in islice(remaining, METRICS_PER_CALL)]:
            self._write(self.store.client.log_batch, metrics=chunk)

    def logged_steps(self, metric: str) -> set[int]:
        """Steps at which a metric has a value."""
        return {point.step for point in self.store.client.get_metric_history(self.run_id, metric)}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags, without secrets."""
        from mlflow.entities import RunTag

        self._write(
            self.store.client.log_batch,
            tags=[RunTag(key, masked(value)[:LONGEST_TAG]) for key, value in tags.items()],
        )

    def describe(self, markdown: str) -> None:
        """Sets the run's description, cut at the end of a line to what MLflow accepts."""
        if len(markdown) > LONGEST_TAG:
            markdown = markdown[: LONGEST_TAG - 4].rpartition("\n")[0] + "\n\n..."
        self.set_tags({NOTE_TAG: markdown})

    def log_dataset(self, dataset: Any) -> None:
        """Logs an MLflow data set as the run's input."""
        from mlflow.entities import DatasetInput, InputTag

        tag = InputTag(key="mlflow.data.context", value="evaluation")
        self._write(self.store.client.log_inputs, datasets=[DatasetInput(dataset=dataset, tags=[tag])])

    def log_tables(self, tables: Mapping[str, Table]) -> None:
        """Logs tables by the names of their artifacts; MLflow's pages know by a tag that these are tables.

        MLflow's own `log_table` would append to the table of an earlier call.
        """
        for name, table in tables.items():
            self.log_json({"columns": list(table.columns), "data": [list(row) for row in table.rows]}, name)
        known = json.loads(self.store.run(self.run_id).data.tags.get(TABLES_TAG, "[]"))
        names = dict.fromkeys((*(each["path"] for each in known), *tables))
        self.set_tags({TABLES_TAG: json.dumps([{"path": name, "type": "table"} for name in names])})

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Logs artifacts by their paths, in one call."""
        if not files:
            return
        with tempfile.TemporaryDirectory(prefix="odedit-artifacts-") as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._write(self.store.client.log_artifacts, local_dir=folder)

    def log_json(self, values: Mapping[str, Any], name: str) -> None:
        """Logs values as a JSON artifact."""
        self._write(self.store.client.log_dict, dictionary=values, artifact_file=name)

    def log_file(self, file: Location, folder: str | None = None) -> None:
        """Logs a file as an artifact, in a folder of artifacts if one is named."""
        with file.local_copy() as path:
            self.log_local_file(path, folder)

    def log_local_file(self, path: Path, folder: str | None = None) -> None:
        """As `log_file`, for a file on this machine."""
        self._write(self.store.client.log_artifact, local_path=str(path), artifact_path=folder)

    def close(self, status: str) -> None:
        """Closes the run as FINISHED, FAILED or KILLED."""
        self._write(self.store.client.set_terminated, status=status)

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """Closes the run; a store that cannot be reached is a warning, since the results do not depend on it.

        Args:
            error: Why the run has failed, which becomes its description.
        """
        try:
            if error is not None and status == FAILED:
                self.describe(one_sentence(error))
            self.close(status)
        except Exception as error:
            _log.warning("MLflow run %s could not be closed: %s", self.run_id, in_words(error))

    def _write(self, call: Callable[..., Any], **named: Any) -> None:
        patiently(call, self.run_id, **named)
