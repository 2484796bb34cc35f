"""The README's lines for a cluster by hand, run as they stand there, on two nodes that are this machine.

They are read from the README. What a reader puts in is put in: addresses, the storage's folder, and, as the nodes share
a machine, ports and scratch folders. `ssh` is a script that runs its command with the home folder of the other node.
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

from tests.support.cluster_files import ROOT, readme_section
from tests.support.mmedit_files import record, write_array, write_images
from tests.support.nodes import NO_SPARE_WORKERS, Cluster, running, wait_for
from tests.support.services import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
PUBLIC = {"/", "/api/healthz", "/api/local_raylet_healthz"}
"""Answered without a token: the dashboard's empty page, and health checks."""
SSH = """#!/usr/bin/env bash
[[ $1 == 127.0.0.1 ]] && HOME=$WORKER_HOME exec bash -c "$2"
"""


def recipe() -> dict[str, str]:
    """The block's lines, by the comment above them."""
    (block,) = re.findall(r"^A cluster by hand.*\n\n((?: {4}.*\n)+)", readme_section(), flags=re.MULTILINE)
    parts = re.split(r"^# (.*)\n", re.sub("^ {4}", "", block, flags=re.MULTILINE), flags=re.MULTILINE)
    assert parts[0] == ""
    return {comment.split(":")[0]: lines for comment, lines in zip(parts[1::2], parts[2::2], strict=True)}


def named_ports() -> set[int]:
    """Those that the lines give to Ray, with all between the first and the last for workers."""
    found = {name: int(port) for name, port in re.findall(r"--([\w-]*port)=(\d+)", "".join(recipe().values()))}
    return {*found.values(), *range(found["min-worker-port"], found["max-worker-port"])}


@dataclass
class Node:
    """A machine of the recipe.

    Attributes:
        home: Home folder of the user there.
        folder: Stands for `/tmp/odedit`.
        ports: The ports that stand for the README's.
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
        script = re.sub(r"(?<=[=:])\d{4,5}\b", lambda found: str(self.ports[int(found[0])]), script)
        return ["bash", "-e", "-c", script]


@dataclass
class Site:
    head: Node
    worker: Node
    processes: tuple[subprocess.Popen[bytes], ...]
    folder: Path

    def listeners(self) -> set[int]:
        """Ports at which the processes of both nodes can be reached."""
        family = [psutil.Process(process.pid) for process in self.processes]
        found = set()
        for process in [*family, *(child for one in family for child in one.children(recursive=True))]:
            with suppress(psutil.NoSuchProcess):
                open_ = process.net_connections(kind="tcp")
                found |= {item.laddr.port for item in open_ if item.status == psutil.CONN_LISTEN}
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    with ExitStack() as stack:
        short = Path(tempfile.mkdtemp(prefix="odedit-", dir="/tmp"))  # sockets have short names
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
        log = short / "log.txt"
        stream = stack.enter_context(log.open("wb"))

        def joined() -> int:
            token = (head.home / ".ray" / "auth_token").read_text()
            return Cluster(f"http://127.0.0.1:{shared[8265]}", "", {"RAY_AUTH_TOKEN": token}, first).alive()

        command = head.command("on every machine", "on the head", shared=folder)
        first = stack.enter_context(running(command, head.environment, stream))
        wait_for(lambda: joined() == 1, first, log)
        command = worker.command("on every machine", "on each worker", shared=folder)
        second = stack.enter_context(running(command, worker.environment, stream))
        wait_for(lambda: joined() == 2, second, log)
        yield Site(head, worker, (first, second), folder)


def test_the_token_and_what_ray_writes_are_the_users_alone(site: Site) -> None:
    tokens = [node.home / ".ray" / "auth_token" for node in (site.head, site.worker)]
    assert [stat.S_IMODE(token.stat().st_mode) for token in tokens] == [0o600, 0o600]
    assert len({token.read_text() for token in tokens}) == 1
    for node in (site.head, site.worker):
        assert stat.S_IMODE(node.folder.stat().st_mode) == 0o700 and any(node.folder.glob("ray/session_*"))


def test_ray_is_reached_at_the_ports_that_are_named_and_only_with_the_token(site: Site) -> None:
    assert "ports 6379 to 6385 and 10100 to 10999" in readme_section()
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
    """The status that a port answers with to a request without a token; None if it speaks no HTTP."""
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
