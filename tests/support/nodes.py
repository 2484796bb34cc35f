"""A Ray cluster of two local nodes with a token, as child processes that end with the test."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from tests.support.services import free_port

PATIENCE_S = 180.0
_STARTS = 3
"""Starts of a node. Ray gives one up after 30 seconds, which a busy machine exceeds, and that cannot be set."""
NO_SPARE_WORKERS = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
"""Variables that keep Ray from starting idle workers for each CPU and driver."""
LOSSES_SEEN_SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "2"}
"""Variables of a head that gives a lost node up within seconds. By default: after five misses, 3 seconds apart."""


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        address: Address of the dashboard, for job submission.
        gcs: Address that a driver connects to.
        environment: Environment of its clients, with the token.
        second: Process of the second node, which a test may kill.
        add: Starts another node, which replaces `second`.
    """

    address: str
    gcs: str
    environment: Mapping[str, str]
    second: subprocess.Popen[bytes] = field(init=False)
    add: Callable[[], None] = field(init=False)

    def alive(self) -> int:
        """Number of nodes that the head reports as alive."""
        request = urllib.request.Request(
            f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            nodes = json.load(reply)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def workers(self, stage: str) -> list[psutil.Process]:
        """The processes of the actors that run a stage of the graph, on both nodes."""
        home = self.environment["RAY_TMPDIR_OF_TEST"]
        return [process for process in processes("RAY_TMPDIR_OF_TEST", home) if stage in _name(process)]

    def is_on_second(self, process: psutil.Process) -> bool:
        try:
            return self.second.pid in (above.pid for above in process.parents())
        except psutil.NoSuchProcess:
            return False

    def lose_second(self) -> None:
        """Kills all processes of the second node at once, like a power failure."""
        for process in [*psutil.Process(self.second.pid).children(recursive=True), psutil.Process(self.second.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.second.wait(30)


def processes(variable: str, value: str) -> Iterator[psutil.Process]:
    """The processes with a value of an environment variable."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


@contextmanager
def two_nodes(cpus: int = 2, head_cpus: int | None = None, **variables: str) -> Iterator[Cluster]:
    """A head and a second node.

    Args:
        cpus: CPUs of each node, possibly more than the machine has.
        head_cpus: CPUs of the head, if different.
        variables: Further environment variables of Ray.
    """
    with ExitStack() as stack:
        # Socket paths must be short; pytest's folders are too deep.
        home = Path(tempfile.mkdtemp(prefix="odedit-ray-", dir="/tmp"))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        token = secrets.token_hex(16)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_TMPDIR_OF_TEST": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **NO_SPARE_WORKERS,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **variables,
        }
        gcs, dashboard = free_port(), free_port()
        common = ["--block", "--node-ip-address=127.0.0.1", "--num-gpus=0"]
        # Free ports for the agents: two nodes on one machine collide on the default.
        common += ["--object-store-memory=200000000", "--disable-usage-stats", "--dashboard-agent-listen-port=0"]
        head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        head.append(f"--num-cpus={cpus if head_cpus is None else head_cpus}")
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", *common]
        address = f"http://127.0.0.1:{dashboard}"
        cluster = Cluster(address, f"127.0.0.1:{gcs}", environment)
        command = [*start, *head, f"--temp-dir={home / 'one'}"]
        cluster.second = started(stack, command, environment, home / "one.txt", lambda: cluster.alive() >= 1)

        def add() -> None:
            number = cluster.alive()
            log = home / f"{number}.txt"
            more = [f"--address=127.0.0.1:{gcs}", f"--num-cpus={cpus}", f"--temp-dir={home / str(number)}"]
            cluster.second = started(stack, [*start, *more], environment, log, lambda: cluster.alive() > number)

        cluster.add = add
        add()
        yield cluster


def started(
    stack: ExitStack, command: list[str], environment: Mapping[str, str], log: Path, has_joined: Callable[[], bool]
) -> subprocess.Popen[bytes]:
    """A node of Ray, which ends with the stack; started again if Ray gives its start up.

    Args:
        command: Command with `ray start --block`.
        log: File of its output.
        has_joined: Whether the cluster has the node.

    Raises:
        AssertionError: All starts failed.
    """

    def is_up() -> bool:
        return "block forever" in log.read_text(errors="replace") and has_joined()

    for _ in range(_STARTS):
        mark = secrets.token_hex(8)
        # Ray leaves the processes of a node whose start it gives up, and some of a node that ends.
        stack.callback(_kill_started, mark)
        output = stack.enter_context(log.open("wb"))
        process = stack.enter_context(running(command, {**environment, "RAY_START_OF_TEST": mark}, output))
        if wait_for(is_up, process, log):
            return process
        _kill_started(mark)
    raise AssertionError(f"it ended with {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}")


def _kill_started(mark: str) -> None:
    for left in processes("RAY_START_OF_TEST", mark):
        with suppress(psutil.NoSuchProcess):
            left.kill()


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=dict(environment), stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        family: list[psutil.Process] = []
        patience_s = 5.0
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:  # a head that has lost a node takes half a minute
                process.kill()
                process.wait()
                patience_s = 0.0
        for left in psutil.wait_procs(family, timeout=patience_s)[1]:
            with suppress(psutil.NoSuchProcess):
                left.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits for a condition; an OSError counts as false. False if the process ended.

    Raises:
        AssertionError: Three minutes passed; with the end of the log.
    """
    begun = time.monotonic()
    while process.poll() is None:
        with suppress(OSError):
            if condition():
                return True
        assert time.monotonic() - begun < PATIENCE_S, log.read_text(errors="replace")[-4000:]
        time.sleep(0.5)
    return False
