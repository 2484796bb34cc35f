"""Ray for one run: started on this machine, or a connection to a running cluster."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from cluster import login
from odedit.errors import Explained, InputError
from odedit.runtime.addresses import masked
from pipeline.config.run import BackboneConfig, PipelineConfig
from pipeline.variables import environment
from pipeline.workers import joining, model, nodes
from pipeline.workers.plan import (
    GROUPS_PER_ACTOR,
    Plan,
    lacking,
    local_plan,
    machine_cpus,
    machine_gpus,
    make_plan,
    shortage,
)

_OBJECT_STORE_BYTES = 2 * 2**30
_LOOPBACK = "127.0.0.1"
_SOCKET = "/rXXXXXXXX/r/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
_LONGEST_BASE = (103 if sys.platform == "darwin" else 107) - len(_SOCKET)
"""Longest path in bytes of the folder below which Ray creates its sockets."""
_READ_AHEAD = ("iter_threaded", "StreamingExecutor")
_READ_AHEAD_S = 10.0


@contextmanager
def connected(
    pipeline: PipelineConfig,
    backbone: BackboneConfig,
    num_groups: int,
    console: Console | None = None,
    groups_per_actor: int = GROUPS_PER_ACTOR,
) -> Iterator[Plan]:
    """Inside, Ray runs, unless the command's own process is the only worker; yields the plan.

    Without an address, Ray is started for this process only, reachable from this machine only and with a secret token;
    it ends with the block. A running cluster is left as it was. Inside a job of a cluster, no address means that
    cluster.

    Args:
        pipeline: Resources of the workers, and the address.
        backbone: Model of the first run.
        num_groups: Number of groups to edit.
        console: Console for messages about resources that a cluster lacks and nodes that it loses.
        groups_per_actor: Groups of a small model for which one more actor is started on this machine.

    Raises:
        InputError: The cluster cannot be reached, or lacks resources for longer than `pipeline.wait_s`.
        GraphError: The cluster has lost nodes, and lacks resources for longer than that.
    """
    address = address_of(pipeline)
    if address is None:
        plan = local_plan(pipeline, backbone, num_groups, groups_per_actor)
        if not plan.in_process:
            model.forget()  # the workers need its memory
        with _own_process() if plan.in_process else _local(plan):
            yield plan
    else:
        model.forget()
        with _cluster(address):
            plan = _cluster_plan(pipeline, backbone, num_groups, console)
            with nodes.watched(plan, pipeline.wait_s, console):
                yield plan


def check_reachable(pipeline: PipelineConfig) -> None:
    """Raises InputError within ten seconds if the run's cluster does not answer or refuses the login."""
    address = address_of(pipeline)
    if address is None:
        return
    if "://" in address and not address.startswith("ray://"):
        raise InputError(
            f"pipeline.ray_address: got {address!r}, expected host:port of a cluster's head, ray://host:port or auto; "
            "null starts Ray on this machine."
        )
    joining.login_to(address)


def address_of(pipeline: PipelineConfig) -> str | None:
    """Address of the cluster in the settings, or of the one that runs this process as a job; None: start Ray here."""
    if pipeline.ray_address is not None:
        return pipeline.ray_address
    # Ray sets it for its jobs. In a shell that submits jobs it may be the dashboard's, which has a scheme.
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") or "://" in address else address


_STARTS, _LATE = 3, "timed out during startup"
"""Tries to start Ray, and the words of its exception for a late start."""
_keep_running = False
_session: Path | None = None
"""Folder of the Ray instance that this process started: sockets, logs and spilled objects."""


@contextmanager
def shared() -> Iterator[None]:
    """Inside, runs on this machine share one Ray, started by the first that needs it and stopped after the block."""
    global _keep_running
    before, _keep_running = _keep_running, True
    try:
        yield
    finally:
        _keep_running = before
        if not before:
            model.forget()
            if "ray" in sys.modules:
                _stop(sys.modules["ray"])


@contextmanager
def _local(plan: Plan) -> Iterator[None]:
    """Inside, Ray runs on this machine."""
    with environment(_local_environment() | _authentication()):
        ray = _import_ray()
        is_ours = _keep_running or not ray.is_initialized()
        try:
            if not ray.is_initialized():  # several runs in one process may share it
                _start(ray, plan)
            yield
        except KeyboardInterrupt:
            if is_ours:  # even if runs share Ray: workers must not write after the run has ended
                _stop(ray)
            raise
        finally:
            if is_ours and not _keep_running:
                _stop(ray)


@contextmanager
def _own_process() -> Iterator[None]:
    """Inside, this process is the worker; its model is freed at the end, unless further runs may need it."""
    try:
        yield
    finally:
        if not _keep_running:
            model.forget()


def _stop(ray: Any) -> None:
    """Stops Ray or closes the connection, after Ray Data's read-ahead threads have ended.

    They end soon after the last result is taken. A thread that calls Ray after the shutdown would exit this process
    without a message.
    """
    deadline = time.monotonic() + _READ_AHEAD_S
    for thread in threading.enumerate():
        if thread.name.startswith(_READ_AHEAD):
            thread.join(max(0.0, deadline - time.monotonic()))
    ray.shutdown()
    _remove_session()


def _remove_session() -> None:
    """Deletes Ray's folder, retrying while its last processes still write to it."""
    global _session
    deadline = time.monotonic() + _READ_AHEAD_S
    while _session is not None and _session.exists() and time.monotonic() < deadline:
        shutil.rmtree(_session, ignore_errors=True)
        time.sleep(0.05)
    _session = None


def _start(ray: Any, plan: Plan) -> None:
    """Starts Ray, again if it is late: Ray gives its first process 30 seconds, which a busy machine may not have.

    Raises:
        Explained: It was late every time.
    """
    global _session
    for _ in range(_STARTS):
        _session = _new_session()
        try:
            with _held_back_stderr():
                ray.init(
                    address="local",
                    num_cpus=max(plan.num_cpus, machine_cpus()),
                    num_gpus=machine_gpus() if plan.device == "cuda" else 0,
                    include_dashboard=False,
                    _node_ip_address=_LOOPBACK,
                    _temp_dir=str(_session / "r"),
                    object_store_memory=_object_store_bytes(),
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception as error:  # Ray's own has no type
            if _LATE not in str(error):
                raise
            late = error
        _end_processes_of(_session)
        _remove_session()
    raise Explained(
        f"Ray did not start on this machine in {_STARTS} tries of 30 seconds: the machine is too busy. Start the "
        "command again when less else runs."
    ) from late


def _end_processes_of(session: Path) -> None:
    """Kills what Ray has started for a session, and waits for it."""
    killed = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(str(session) in word for word in process.cmdline()):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=10)


def _new_session() -> Path:
    """A private folder for Ray's sockets and logs; Ray's default has mode 0777 and is never deleted.

    Raises:
        InputError: `RAY_TMPDIR` cannot be used.
    """
    base = os.environ.get("RAY_TMPDIR") or "/tmp"
    if len(os.fsencode(os.path.abspath(base))) > _LONGEST_BASE:
        raise InputError(
            f"RAY_TMPDIR: {base!r} is longer than {_LONGEST_BASE} bytes, and the system allows no longer paths for the "
            "sockets that lie in it. Name a folder with a shorter path."
        )
    try:
        os.makedirs(base, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="r", dir=os.path.abspath(base)))
    except OSError as error:
        raise InputError(
            f"RAY_TMPDIR: no folder can be made in {base!r} ({error.strerror}). Name one that you may write to."
        ) from error


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Inside, this process is connected to the cluster. Raises InputError if it does not answer."""
    ray = _import_ray()
    with environment({} if ray.is_initialized() else joining.login_to(address)), nodes.silenced():
        login.read_again()
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"pipeline.ray_address: no Ray answers at {address!r} ({str(error).splitlines()[0]}). "
                "Give a running cluster, or null to start Ray on this machine."
            ) from error
        try:
            yield
        finally:
            _stop(ray)  # ends the connection, not the cluster


def _cluster_plan(pipeline: PipelineConfig, backbone: BackboneConfig, num_groups: int, console: Console | None) -> Plan:
    """The plan for the cluster, once it has the resources that the settings request."""
    ray = _import_ray()

    def look() -> tuple[Plan, str]:
        resources = ray.cluster_resources()
        num_cpus, num_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        planned = num_gpus or (pipeline.gpus_per_actor if pipeline.device == "cuda" else 0.0)
        if backbone.gpus > 1:  # nodes with them may still join
            planned = max(planned, backbone.gpus)
        plan = make_plan(pipeline, backbone, max(1, int(num_cpus)), planned, num_groups)
        return plan, shortage(plan, num_cpus, num_gpus) or lacking(plan, ray.nodes())

    return nodes.awaited(look, pipeline.wait_s, console)


def _import_ray() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data
        from ray._private import ray_constants
    # Ray reads it when it is imported, which may have happened before the variable was set.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0"
    return ray


def _local_environment() -> dict[str, str]:
    """Environment variables for Ray's processes and the workers."""
    source = str(Path(__file__).resolve().parents[2])
    # Workers find editors outside the tree on the paths of this process.
    paths = [source, *(path or os.getcwd() for path in sys.path)]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # Otherwise Ray on Linux replaces a loopback address by a network card's, and listens on all of them.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_LOG_LEVEL": "ERROR",
        # Without it Ray warns on standard error about its own passing of constructor arguments.
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_enable_metrics_collection": "0",
        # With Ray's default of 15, everything else on the machine would run first.
        "RAY_worker_niceness": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def _authentication() -> dict[str, str]:
    """A token for this Ray instance. Always set: Ray 2.60 would write a token file, which breaks later sessions."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return {}
    if "ray" in sys.modules:
        # Ray reads its mode when it is imported; a server with another mode would refuse this process.
        from ray._private.authentication.authentication_utils import is_token_auth_enabled

        if not is_token_auth_enabled():
            return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or _own_token()}


@cache
def _own_token() -> str:
    """Secret token of every Ray that this process starts: Ray's client keeps the first one that it reads."""
    return secrets.token_hex(32)


@contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Inside, standard error is held back, native code's included; it is shown only if the block fails."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(before, masked(held.read().decode(errors="replace")).encode())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)


def _object_store_bytes() -> int:
    """Size of the object store: a few groups between the stages, and never more than shared memory holds."""
    wanted = min(_OBJECT_STORE_BYTES, psutil.virtual_memory().available // 5)
    shared = Path("/dev/shm")
    if sys.platform == "linux" and shared.exists():
        wanted = min(wanted, int(psutil.disk_usage(str(shared)).free * 0.8))
    return max(wanted, 80 * 2**20)
