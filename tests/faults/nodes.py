"""A Ray cluster on this machine's loopback: a head without cores, and nodes that can be killed.

A node is a child process, `ray start --block`. Ray as it is would listen on all of the machine's addresses as soon as
there is a second node; started through this file it takes the loopback address for the machine's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
PATIENCE_S = 120.0
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    "RAY_AUTH_MODE": "disabled",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "PYTHONWARNINGS": "ignore",
}
DRIVER = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment of a process that connects to it: it takes the loopback address for its own, too."""


class Cluster:
    """A head and its nodes; each node has two cores in Ray's accounts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._head: Node | None = None
        self.nodes: list[Node] = []
        self.address = ""

    @property
    def is_running(self) -> bool:
        return self._head is not None

    def start(self) -> None:
        """Starts the head, and the first node."""
        port = free_port()
        self.address = f"{LOOPBACK}:{port}"
        options = ("--head", f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false")
        self._head = Node(self._folder / "head", *options, "--num-cpus=0")
        self._head.wait_until_ready()
        self.add()

    def add(self) -> Node:
        """Starts one more node."""
        node = Node(self._folder / f"node-{len(self.nodes)}", f"--address={self.address}", "--num-cpus=2")
        self.nodes.append(node)
        node.wait_until_ready()
        return node

    def node_of(self, process: int) -> Node:
        """The node that a worker belongs to."""
        above = {parent.pid for parent in psutil.Process(process).parents()}
        (node,) = [node for node in self.nodes if node.process.pid in above]
        return node

    def stop(self) -> None:
        for node in (*self.nodes, *([self._head] if self._head else [])):
            node.stop()


class Node:
    """`ray start --block`, and everything that it starts in turn."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "log.txt"
        command = [sys.executable, str(Path(__file__).resolve()), "start", *options, "--block", "--disable-usage-stats"]
        command += [f"--temp-dir={folder}", f"--node-ip-address={LOOPBACK}", f"--object-store-memory={100 * 2**20}"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        begun = time.monotonic()
        while "Ray runtime started" not in self._log.read_text():
            if self.process.poll() is not None or time.monotonic() - begun > PATIENCE_S:
                raise RuntimeError(f"A node of Ray does not start:\n{self._log.read_text()}")
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill_raylet(self) -> None:
        """SIGKILL for the process that is the node to the rest of the cluster."""
        (raylet,) = [process for process in self.family() if process.name() == "raylet"]
        raylet.kill()

    def stop(self) -> None:
        """Ends all of it: kindly, then not."""
        family = self.family()
        self.process.terminate()
        _, left = psutil.wait_procs(family, 10)
        for process in left:
            process.kill()
        psutil.wait_procs(left, 10)
        self.process.wait(10)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is not started yet, and stopped in the end; its paths are short, as sockets need."""
    folder = Path(tempfile.mkdtemp(prefix="odedit-ray-"))
    found = Cluster(folder)
    try:
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])


def _ray() -> None:
    """The command `ray`, with the loopback address for the machine's."""
    from ray._private import services
    from ray.scripts.scripts import main

    services.get_node_ip_address = lambda address=None: LOOPBACK
    main()


if __name__ == "__main__":
    _ray()
