"""MLflow, and the only file that knows it.

Everything is logged by the driver, in few large calls: many workers writing one row each would queue for the database.
One run of the pipeline is one MLflow run; resuming continues it.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from odedit.errors import Explained, InputError, in_words, listed
from odedit.evaluation.columns import HIGH, LOW, column
from odedit.evaluation.statistics import MAIN
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, Place, at
from pipeline.config.reachable import check_server
from pipeline.config.run import RunConfig, TrackingConfig
from pipeline.run_folder import rows as results
from pipeline.run_folder.reasons import sentences
from pipeline.run_folder.workspace import Workspace, check_access
from pipeline.tracking.locks import alone, patiently
from pipeline.variables import environment

METRICS_PER_CALL = 1000
PARAMETERS_PER_CALL = 100
_IMPATIENT_S = 6
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PARENT_TAG = "mlflow.parentRunId"
_TABLE_COLUMNS = (
    "edit_id",
    "status",
    "error",
    "prompt",
    "target",
    "answer_before",
    "answer_after",
    *MAIN,
    "steps",
    "seconds",
)


class TrackingError(Explained, RuntimeError):
    """MLflow could not be written to; the results themselves are complete on disk."""


def store_uri(tracking: TrackingConfig, out: Place) -> str:
    """Address of the store: the configured one, or a database in the parent folder of `out`.

    Raises:
        InputError: None is configured, and beside an address there is no place for a database.
    """
    if tracking.uri:
        return tracking.uri
    place = at(out, "out")
    if not place.is_local:
        raise InputError(
            f"tracking.uri: has to be given where results go to an address ({place}): a server, or a database on this "
            "machine such as sqlite:///mlflow.db. Without MLflow: tracking.enabled=false."
        )
    return f"sqlite:///{place.parent / 'mlflow.db'}"


def check(tracking: TrackingConfig, out: Location) -> None:
    """Looks whether a run could be logged, within seconds; makes nothing that was not there.

    Raises:
        InputError: The store or the experiment cannot be used.
    """
    if not tracking.enabled:
        return
    uri = store_uri(tracking, out)
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
        check_access(at(database.parent), "tracking.uri")
        if not database.exists():
            return
    else:
        check_server(uri, "tracking.uri")
    with _impatient():
        _check_experiment(_client(uri, _IMPATIENT_S).get_experiment_by_name(tracking.experiment), tracking.experiment)


def _impatient() -> AbstractContextManager[None]:
    """Inside, a server that does not answer is given up within seconds, unless the user has said otherwise."""
    names = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(_IMPATIENT_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return environment({name: value for name, value in names.items() if name not in os.environ})


def masked_values(value: Any) -> Any:
    """`masked` for every text inside nested lists and mappings."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: masked_values(item) for key, item in value.items()}
    return [masked_values(item) for item in value] if isinstance(value, list) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names.

    >>> flatten({"editor": {"name": "wise"}, "seed": 0})
    {'editor.name': 'wise', 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def open_command(uri: str) -> str:
    """What a user types to look at the store."""
    if uri.startswith("http"):
        return shlex.join(["open", masked(uri)])
    program = Path(sys.executable).with_name("mlflow")
    beside_us = os.path.relpath(program) if program.exists() else "mlflow"
    if beside_us.startswith(os.pardir):
        beside_us = "mlflow"
    return shlex.join([beside_us, "ui", "--backend-store-uri", masked(uri)])


def _client(uri: str, patience_s: float = 60.0) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A wrong address should fail in seconds.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # MLflow would print the address of every run that ends, with the password in it, into results and logs.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with alone(uri):
            _connect_once(uri, patience_s)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:
        hint = ""
        if getattr(error, "error_code", "") in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            hint = " Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        raise InputError(f"tracking.uri: {masked(uri)!r} cannot be used ({in_words(error)}).{hint}") from error
    return client


def _connect_once(uri: str, patience_s: float) -> None:
    """Raises what a database says that cannot be used; MLflow would try again for more than a minute first.

    In another thread: most drivers have no time-out for a server that takes the connection and sends nothing.
    """
    if uri.partition(":")[0].partition("+")[0] not in _DATABASES:
        return
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    errors: list[Exception] = []

    def connect() -> None:
        try:
            create_engine(uri, poolclass=NullPool).connect().close()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, name="odedit-database", daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive():
        raise TimeoutError(f"the database has not answered within {patience_s:g} s")
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class Tracker:
    """One MLflow run."""

    client: Any
    uri: str
    run_id: str

    @classmethod
    def start(
        cls,
        config: RunConfig,
        workspace: Workspace,
        run_id: str | None,
        code: str,
        dataset: Mapping[str, Any],
        parent_run: str | None = None,
    ) -> Tracker:
        """Continues the run of that id, or creates one with its parameters and data set, as a child if it has a parent.

        Raises:
            InputError: The store cannot be reached.
        """
        uri = store_uri(config.tracking, workspace.out)
        client = _client(uri)
        if run_id is not None and _exists(client, run_id):
            patiently(client.update_run, run_id, status="RUNNING")
            return cls(client, uri, run_id)
        experiment = _experiment(client, uri, config.tracking.experiment)
        tags = _tags(config, code) | ({PARENT_TAG: parent_run} if parent_run else {})
        run = patiently(client.create_run, experiment, run_name=config.name, tags=tags)
        tracker = cls(client, uri, run.info.run_id)
        tracker._log_settings(config, dataset)
        return tracker

    def log_parameters(self, config: RunConfig) -> None:
        """Every setting, as a parameter of the run."""
        self.log_values(flatten(config.to_dict()))

    def log_values(self, values: Mapping[str, Any]) -> None:
        """Parameters of the run, without secrets. MLflow refuses another value for one that is there."""
        from mlflow.entities import Param

        parameters = iter([Param(key, str(masked_values(value))) for key, value in values.items()])
        while chunk := list(islice(parameters, PARAMETERS_PER_CALL)):
            patiently(self.client.log_batch, self.run_id, params=chunk)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run, without secrets."""
        from mlflow.entities import RunTag

        patiently(
            self.client.log_batch, self.run_id, tags=[RunTag(key, masked(value)[:5000]) for key, value in tags.items()]
        )

    def _log_settings(self, config: RunConfig, dataset: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self.log_parameters(config)
        entity = Dataset(
            name=Path(str(dataset["path"])).name[:490],
            digest=str(dataset["digest"])[:36],
            source_type="local",
            source=json.dumps({"uri": masked(str(dataset["path"]))}),
            profile=json.dumps({"usable": dataset["usable"], "problems": dataset["problems"]}),
        )
        tag = InputTag(key="mlflow.data.context", value="evaluation")
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset=entity, tags=[tag])])

    def log_results(self, config: RunConfig, workspace: Workspace, summary: Mapping[str, Any]) -> None:
        """Metrics and intervals, loss curves of a sample, tables, files.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        try:
            self._log_metrics(summary)
            self._log_curves(workspace, config.tracking.curves)
            self._log_tables(workspace)
            for path in (workspace.config, workspace.summary, workspace.calibration, workspace.report):
                if path.exists():
                    self._log_file(path)
            for path in results.parts(workspace):
                self._log_file(path, "results")
            logged, left_out = self._log_edits(workspace, config.tracking.edits_gib)
            if reasons := sentences(summary.get("reasons", [])):
                self.set_tags({"odedit.reasons": "\n".join(reasons)})
            self.client.set_tag(self.run_id, "odedit.edits_logged", str(logged))
            self.client.set_tag(self.run_id, "odedit.edits_left_out", str(left_out))
        except Exception as error:
            raise TrackingError(
                f"MLflow at {masked(self.uri)} could not be written to ({in_words(error)}). The results are complete "
                f"in {workspace.out}; the same command, or `odedit mlflow sync {workspace.out}`, logs them once it can."
            ) from error

    def _log_metrics(self, summary: Mapping[str, Any]) -> None:
        values: dict[str, float] = {name: float(summary[name]) for name in ("n", "failed", "skipped")}
        for name, figure in summary["metrics"].items():
            values |= {
                name: figure["mean"],
                column(name, LOW): figure["low"],
                column(name, HIGH): figure["high"],
            }
        self.log_points((name, value, 0) for name, value in values.items())

    def _log_curves(self, workspace: Workspace, num_edits: int) -> None:
        columns = ("edit_id", "status", "losses")
        rows = results.read_rows(results.parts(workspace), columns)
        edited = (row for row in rows if row["status"] == results.EDITED and row.get("losses"))
        self.log_points(
            (f"curves/{row['edit_id']}/{name}", value, step)
            for row in islice(edited, num_edits)
            for name, values in row["losses"].items()
            for step, value in enumerate(values)
        )

    def log_points(self, points: Iterable[tuple[str, float, int]]) -> None:
        """Metrics: name, value and step."""
        from mlflow.entities import Metric

        now, rest = int(time.time() * 1000), iter(points)
        while chunk := [Metric(name, value, now, step) for name, value, step in islice(rest, METRICS_PER_CALL)]:
            patiently(self.client.log_batch, self.run_id, metrics=chunk)

    def _log_tables(self, workspace: Workspace) -> None:
        rows = list(islice(results.read_rows(results.parts(workspace), _TABLE_COLUMNS), METRICS_PER_CALL))
        table = {name: [row.get(name) for row in rows] for name in _TABLE_COLUMNS}
        # log_table adds to a table that is there, so the file is written whole instead; the format is the same.
        data = {"columns": list(table), "data": [list(values) for values in zip(*table.values(), strict=True)]}
        self.client.log_dict(self.run_id, data, "edits_table.json")

    def _log_edits(self, workspace: Workspace, max_gib: float) -> tuple[int, int]:
        room, logged = max_gib * 2**30, 0
        # Names alone: there may be as many as records.
        names = [name for name in workspace.edits.names("*.safetensors") if not name.startswith(".")]
        for name in names:
            with (workspace.edits / name).local_copy() as file:
                room -= file.stat().st_size
                if room < 0:
                    break
                self.client.log_artifact(self.run_id, str(file), "edits")
            logged += 1
        return logged, len(names) - logged

    def _log_file(self, place: Location, folder: str | None = None) -> None:
        with place.local_copy() as file:
            self.client.log_artifact(self.run_id, str(file), folder)

    def finish_with(self, summary: Mapping[str, Any]) -> None:
        """Closes the run as FINISHED, or as FAILED if no record was edited."""
        self.finish("FINISHED" if summary["n"] else "FAILED")

    def finish(self, status: str) -> None:
        """Closes the run as FINISHED, FAILED or KILLED; a store that is gone by now changes nothing for the results."""
        try:
            patiently(self.client.set_terminated, self.run_id, status=status)
        except Exception as error:
            logging.getLogger(__name__).warning("MLflow run %s could not be closed: %s", self.run_id, in_words(error))


def log_training(
    config: RunConfig,
    code: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    out: Location,
    notes: Mapping[str, str],
) -> str:
    """Logs the training of an editor's weights as one run; returns the address of the store.

    Args:
        curves: Steps and values by name.
        out: File of the weights; the store is in its folder's parent as that of a run is.
        notes: Tags.

    Raises:
        TrackingError: The store refused; the weights themselves are complete.
    """
    uri = store_uri(config.tracking, out)
    try:
        client = _client(uri)
        experiment = _experiment(client, uri, config.tracking.experiment)
        name = config.tracking.run_name or f"train-{out.stem}"
        run = client.create_run(experiment, run_name=name, tags=_tags(config, code) | dict(notes))
        tracker = Tracker(client, uri, run.info.run_id)
        tracker.log_parameters(config)
        points = ((name, value, step) for name, curve in curves.items() for step, value in curve)
        tracker.log_points(points)
        tracker.finish("FINISHED")
    except Exception as error:
        raise TrackingError(
            f"MLflow at {masked(uri)} could not be written to ({in_words(error)}). The weights are complete: {out}."
        ) from error
    return uri


@dataclass(frozen=True)
class StudyRun:
    """The MLflow run of a study; its arms' runs are its children."""

    client: Any
    run_id: str

    @classmethod
    def start(
        cls, uri: str, experiment: str, name: str, study: Mapping[str, Any], run_id: str | None, code: str
    ) -> StudyRun:
        """Continues the run of that id, or creates one that holds what the study is.

        Raises:
            InputError: The store cannot be reached.
        """
        client = _client(uri)
        if run_id is not None and _exists(client, run_id):
            client.update_run(run_id, status="RUNNING")
            return cls(client, run_id)
        tags = {"odedit.version": code, "odedit.study": name}
        run = client.create_run(_experiment(client, uri, experiment), run_name=name, tags=tags)
        client.log_dict(run.info.run_id, masked_values(study), "study.json")
        return cls(client, run.info.run_id)

    def log_study(self, files: Sequence[Location], metrics: Mapping[str, float]) -> None:
        """Tables, picture, and one figure for each arm, task and column.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = iter([Metric(name, value, now, 0) for name, value in metrics.items()])
        try:
            while chunk := list(islice(points, METRICS_PER_CALL)):
                self.client.log_batch(self.run_id, metrics=chunk)
            for file in files:
                with file.local_copy() as path:
                    self.client.log_artifact(self.run_id, str(path))
        except Exception as error:
            raise TrackingError(f"MLflow could not be written to ({in_words(error)}).") from error

    def finish(self, status: str) -> None:
        """Closes the run as FINISHED, FAILED or KILLED."""
        try:
            patiently(self.client.set_terminated, self.run_id, status=status)
        except Exception as error:
            logging.getLogger(__name__).warning("MLflow run %s could not be closed: %s", self.run_id, in_words(error))


def fetch_edit(uri: str, run_id: str, edit_id: str, folder: Path) -> Path:
    """Downloads an edit that a run logged; returns the file.

    Raises:
        InputError: There is no such store, run or edit.
    """
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():  # opening it would create it
        raise InputError(f"edit {edit_id!r} of run {run_id!r} cannot be fetched: there is no database {database}.")
    client = _client(uri)
    try:
        return Path(client.download_artifacts(run_id, f"edits/{edit_id}.safetensors", str(folder)))
    except Exception as error:
        reason = in_words(error) if not _exists(client, run_id) else _logged_edits(client, run_id)
        raise InputError(f"edit {edit_id!r} of run {run_id!r} cannot be fetched: {reason}") from error


def _logged_edits(client: Any, run_id: str) -> str:
    """Which edits a run has, in a sentence."""
    names = sorted(Path(file.path).stem for file in client.list_artifacts(run_id, "edits"))
    if not names:
        return "the run has logged no edits (tracking.edits_gib bounds how many are)."
    return f"the run has {listed(names)}."


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def _experiment(client: Any, uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        _check_experiment(experiment, name)
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        # MLflow's default would be the working directory of whoever logs first.
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(patiently(client.create_experiment, name, artifact_location=location))
    except Exception:
        # Another run may have created it in the meantime.
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _check_experiment(experiment: Any, name: str) -> None:
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise InputError(f"tracking.experiment: {name!r} was deleted in MLflow. Restore it or choose another name.")


def _tags(config: RunConfig, code: str) -> dict[str, str]:
    return {
        "odedit.version": code,
        "odedit.editor": config.editor.name,
        "odedit.objective": config.objective.name,
        "odedit.backbone": f"{config.backbone.family}:{config.backbone.checkpoint}",
        "odedit.supervision": results.supervision_name(config),
    }
