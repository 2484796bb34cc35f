"""The connection to an MLflow store: its address, a check that it can be used, and its client."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import threading
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from odedit.errors import InputError, in_words
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, LocationLike, at
from pipeline.config.reachable import check_server
from pipeline.config.run import TrackingConfig
from pipeline.run_folder.workspace import check_access
from pipeline.tracking import experiments
from pipeline.tracking.locks import WholeCalls, creation_lock
from pipeline.variables import environment

_CHECK_TIMEOUT_S = 6
_SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_RESERVED_ALIAS = re.compile(r"(?i)latest|v\d+")


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
        check_experiment(experiment, tracking.experiment)


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


def check_experiment(experiment: Any, name: str) -> None:
    """Raises InputError if the experiment was deleted in MLflow."""
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise InputError(f"tracking.experiment: {name!r} was deleted in MLflow. Restore it or choose another name.")
