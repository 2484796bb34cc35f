"""The commands for a cluster by hand in `cluster/README.md`, run on two nodes on this machine.

Addresses and the storage's folder are replaced as a reader would, and so are ports and scratch folders, since both
nodes share this machine. `ssh` is a script that runs its command with the home folder of the other node.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.cluster_files import ROOT, page
from tests.support.mmedit_files import record, write_array, write_images
from tests.support.nodes import NO_SPARE_WORKERS, Cluster, started
from tests.support.services import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
PUBLIC = {"/", "/api/healthz", "/api/local_raylet_healthz"}
"""Paths that Ray answers without a token: the dashboard's empty page, and health checks."""
SSH = """#!/usr/bin/env bash
[[ $1 == 127.0.0.1 ]] && HOME=$WORKER_HOME exec bash -c "$2"
"""


def recipe() -> dict[str, str]:
    """Commands of the page's section, by the comment above them."""
    section = page().split("\n## By hand\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"\n\n((?: {4}.*\n)+)", section)
    parts = re.split(r"^# (.*)\n", re.sub("^ {4}", "", block, flags=re.MULTILINE), flags=re.MULTILINE)
    assert parts[0] == ""
    return {comment.split(":")[0]: lines for comment, lines in zip(parts[1::2], parts[2::2], strict=True)}


def named_ports() -> set[int]:
    """Ports in the commands, with the range of the workers."""
    ports = {name: int(port) for name, port in re.findall(r"--([\w-]*port)=(\d+)", "".join(recipe().values()))}
    return {*ports.values(), *range(ports["min-worker-port"], ports["max-worker-port"])}


@dataclass
class Node:
    """A machine of the recipe.

    Attributes:
        home: Home folder of the user.
        folder: Replacement of `/tmp/odedit`.
        ports: Ports of this node, by the page's ports.
        environment: Environment of the node's processes.
    """

    home: Path
    folder: Path
    ports: Mapping[int, int]
    environment: Mapping[str, str]

    def command(self, *parts: str, shared: Path) -> list[str]:
        script = "".join(recipe()[part] for part in parts)
        for name, value in {"HEAD": "127.0.0.1", "WORKER": "127.0.0.1", "/tmp/odedit": str(self.folder)}.items():
            script = script.replace(name, value)
        script = script.replace("=/shared/", f"={shared}/").replace("ray start --block", "exec ray start --block")
        script = re.sub(r"(?<=[=:])\d{4,5}\b", lambda port: str(self.ports[int(port[0])]), script)
        return ["bash", "-e", "-c", script]


@dataclass
class Site:
    head: Node
    worker: Node
    processes: tuple[subprocess.Popen[bytes], ...]
    folder: Path

    def listeners(self) -> set[int]:
        """Ports on which the processes of both nodes listen."""
        parents = [psutil.Process(process.pid) for process in self.processes]
        ports = set()
        for process in [*parents, *(child for parent in parents for child in parent.children(recursive=True))]:
            with suppress(psutil.NoSuchProcess):
                connections = process.net_connections(kind="tcp")
                ports |= {item.laddr.port for item in connections if item.status == psutil.CONN_LISTEN}
        return ports


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    with ExitStack() as stack:
        short = Path(tempfile.mkdtemp(prefix="odedit-", dir="/tmp"))  # paths of Unix sockets are limited to 107 bytes
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": os.pathsep.join([str(ssh.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "WORKER_HOME": str(folder / "worker"),
            "RAY_USAGE_STATS_ENABLED": "0",
            **NO_SPARE_WORKERS,
        }
        shared = {port: free_port() for port in (6379, 8265)}
        start = random.randrange(20_000, 28_000)
        nodes = []
        for name in ("head", "worker"):
            (folder / name).mkdir()
            own = {port: free_port() for port in range(6380, 6386)} | {10100: start, 10999: start + 899}
            start += 900
            home = {"HOME": str(folder / name)}
            nodes.append(Node(folder / name, short / name, shared | own, environment | home))
        head, worker = nodes

        def joined() -> int:
            token = (head.home / ".ray" / "auth_token").read_text()
            return Cluster(f"http://127.0.0.1:{shared[8265]}", "", {"RAY_AUTH_TOKEN": token}).alive()

        command = head.command("on every machine", "on the head", shared=folder)
        first = started(stack, command, head.environment, short / "head.txt", lambda: joined() == 1)
        command = worker.command("on every machine", "on each worker", shared=folder)
        second = started(stack, command, worker.environment, short / "worker.txt", lambda: joined() > 1)
        yield Site(head, worker, (first, second), folder)


def test_the_token_and_what_ray_writes_are_the_users_alone(site: Site) -> None:
    tokens = [node.home / ".ray" / "auth_token" for node in (site.head, site.worker)]
    assert [stat.S_IMODE(token.stat().st_mode) for token in tokens] == [0o600, 0o600]
    assert len({token.read_text() for token in tokens}) == 1
    for node in (site.head, site.worker):
        assert stat.S_IMODE(node.folder.stat().st_mode) == 0o700 and any(node.folder.glob("ray/session_*"))


def test_ray_is_reached_at_the_ports_that_are_named_and_only_with_the_token(site: Site) -> None:
    assert "ports 6379 to 6385 and 10100 to 10999" in page()
    assert named_ports() == {*range(6379, 6386), *range(10100, 11000), 8265}
    named = {*range(site.head.ports[10100], site.worker.ports[10999] + 1)}
    named |= {*site.head.ports.values(), *site.worker.ports.values()}
    listening = site.listeners()
    assert len(listening) >= 10 and listening <= named
    for port in listening:
        for path in ("/metrics", "/nodes", "/api/version", "/api/jobs/", *PUBLIC):
            status = answer(port, path)
            assert status in (None, 401, 404) or path in PUBLIC, (port, path, status)


def answer(port: int, path: str) -> int | None:
    """HTTP status of a request without a token; None if the port speaks no HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_a_run_is_submitted_and_its_results_are_on_the_shared_storage(site: Site) -> None:
    records = [record(number) for number in range(2)]
    image_root, rephrase_root = write_images(site.folder, records)
    write_array(site.folder / "records.json", records)
    values = {
        "data": {"path": "records.json", "image_root": image_root.name, "rephrase_root": rephrase_root.name},
        "supervision": {"locality_source": "record"},
        "editor": {"name": "ftl", "max_steps": 1},
        "objective": {"name": "native"},
        "evaluation": {"generate": False},
        "pipeline": {"actors": 1, "threads_per_actor": 1},
        "tracking": {"enabled": False},
    }
    (site.folder / "run.yaml").write_text(yaml.safe_dump(values))
    done = subprocess.run(
        site.head.command("to submit", shared=site.folder),
        cwd=site.folder,
        env=dict(site.head.environment),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    summary = json.loads((site.folder / "runs" / "one" / "summary.json").read_text())
    assert (summary["n"], summary["failed"]) == (2, 0)
