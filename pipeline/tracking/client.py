"""The connection to MLflow: address of the store, and all calls of its client.

Only the driver logs, in few large calls: many small writes by workers would queue for the database.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from odedit.errors import Explained, InputError, in_words, one_sentence
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, LocationLike, at
from pipeline.config.reachable import check_server
from pipeline.config.run import TrackingConfig
from pipeline.config.values import masked_values
from pipeline.run_folder.workspace import check_access
from pipeline.tracking import experiments
from pipeline.tracking.locks import WholeCalls, creation_lock, patiently
from pipeline.variables import environment

METRICS_PER_CALL = 1000
PARAMETERS_PER_CALL = 100
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"
_RUNS_PER_PAGE = 1000
LONGEST_TAG = 5000
_CHECK_TIMEOUT_S = 6
_SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_RESERVED_ALIAS = re.compile(r"(?i)latest|v\d+")
_log = logging.getLogger(__name__)


class TrackingError(Explained, RuntimeError):
    """MLflow could not be written to; the results themselves are complete on disk."""


def store_uri(tracking: TrackingConfig, out: LocationLike) -> str:
    """Address of the store: the configured one, or a database in the parent folder of `out`.

    Raises:
        InputError: No address is configured, and `out` is not a local folder.
    """
    if tracking.uri:
        return tracking.uri
    location = at(out, "out")
    if not location.is_local:
        raise InputError(
            f"tracking.uri: has to be given where results go to an address ({location}): a server, or a database on "
            "this machine such as sqlite:///mlflow.db. Without MLflow: tracking.enabled=false."
        )
    return f"{_SQLITE}{location.parent / 'mlflow.db'}"


def database_file(uri: str) -> Path | None:
    """File of an sqlite store; None for other stores."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def check(tracking: TrackingConfig, out: Location) -> None:
    """Checks within seconds that a run can be logged; creates nothing.

    Raises:
        InputError: The store, the experiment or the alias cannot be used.
    """
    if not tracking.enabled:
        return
    if tracking.register is not None and _RESERVED_ALIAS.fullmatch(tracking.alias):
        raise InputError(f"tracking.alias: MLflow reserves {tracking.alias!r}. Choose another name.")
    uri = store_uri(tracking, out)
    database = database_file(uri)
    if database is None:
        check_server(uri, "tracking.uri")
    else:
        check_access(at(database.absolute().parent), "tracking.uri")
        if not database.exists():
            return
    with _short_timeouts():
        experiment = connect(uri, _CHECK_TIMEOUT_S).get_experiment_by_name(tracking.experiment)
        _check_experiment(experiment, tracking.experiment)


def _short_timeouts() -> AbstractContextManager[None]:
    """Inside, requests to a server time out within seconds, unless the environment sets another time."""
    names = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(_CHECK_TIMEOUT_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return environment({name: value for name, value in names.items() if name not in os.environ})


def open_command(uri: str) -> str:
    """The shell command that shows the store in a browser."""
    if uri.startswith("http"):
        return shlex.join(["open", f"{masked(uri).rstrip('/')}/#/experiments?{experiments.MODEL_TRAINING}"])
    program = Path(sys.executable).with_name("mlflow")
    name = os.path.relpath(program) if program.exists() else "mlflow"
    if name.startswith(os.pardir):
        name = "mlflow"
    return shlex.join([name, "ui", "--backend-store-uri", masked(uri)])


def connect(uri: str, timeout_s: float = 60.0) -> Any:
    """An MlflowClient whose store has answered. Raises InputError if the store cannot be used."""
    client_class = _client_class()
    try:
        database = database_file(uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        with creation_lock(uri):
            _connect_once(uri, timeout_s)
            client = client_class(tracking_uri=uri)
            if _is_database(uri):
                client = WholeCalls(client)
            client.search_experiments(max_results=1)
    except Exception as error:
        hint = ""
        if getattr(error, "error_code", "") in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            hint = " Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        raise InputError(f"tracking.uri: {masked(uri)!r} cannot be used ({in_words(error)}).{hint}") from error
    return client


def _is_database(uri: str) -> bool:
    """Whether the store is a database, and not a server."""
    return uri.partition(":")[0].partition("+")[0] in _DATABASES


def _client_class() -> type[Any]:
    """MlflowClient, imported with telemetry and console output off."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A wrong address fails in seconds, not minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # MLflow would print the address of every run that ends, password included, into results and logs.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient
    return MlflowClient


def _connect_once(uri: str, timeout_s: float) -> None:
    """Raises the error of a database that cannot be used, which MLflow would retry for more than a minute.

    Connects in another thread: most drivers have no timeout for a server that accepts the connection and sends nothing.
    """
    if not _is_database(uri):
        return
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    errors: list[Exception] = []

    def attempt() -> None:
        try:
            create_engine(uri, poolclass=NullPool).connect().close()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, name="odedit-database", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"the database has not answered within {timeout_s:g} s")
    if errors:
        raise errors[0]


def _check_experiment(experiment: Any, name: str) -> None:
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise InputError(f"tracking.experiment: {name!r} was deleted in MLflow. Restore it or choose another name.")


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
            _check_experiment(experiment, name)
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
