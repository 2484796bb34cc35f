"""Eight processes that log searches to one store at once lose nothing: a file, and a server before a database."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from pipeline import tracking
from pipeline.search_tracking import POINT, SearchRun
from pipeline.tracking import PARENT_TAG
from tune.config import check, from_values
from tune.points import COMPLETE, Points

WRITERS, TRIALS, RUNGS = 8, 3, (2, 4, 8)
PATIENCE_S = 120.0


def write(uri: str, writer: int) -> None:
    """One search: every figure tells who wrote it."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    search = SearchRun.start(uri, "together", f"search {writer}", f"id-{writer}", {"writer": writer}, {}, None)
    for trial in range(TRIALS):
        key = f"{writer}-{trial}"
        search.open_trial(key, trial, {f"setting.{name}": trial for name in range(20)}, {})
        for edits in RUNGS:
            search.log_rungs(key, {edits: {"edits": edits, "score": writer + trial / 10 + edits / 1000}})
        search.close_trial(key, "complete", {}, {}, {"rel": [(step, float(step)) for step in range(50)]})
    search.log_search([], {"best": float(writer)}, {"best.trial": "0"})
    search.end("FINISHED")
    assert search.failed is None, search.failed


def check_together(uri: str) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "pipeline.search_tracking"])
    processes = [context.Process(target=write, args=(uri, writer)) for writer in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * WRITERS
    client = tracking._client(uri)
    experiment = client.get_experiment_by_name("together").experiment_id
    every = client.search_runs([experiment], max_results=1000)
    assert len(every) == WRITERS * (1 + TRIALS)
    assert {run.info.status for run in every} == {"FINISHED"}
    parents = {run.info.run_id: run for run in every if PARENT_TAG not in run.data.tags}
    assert sorted(run.data.metrics["best"] for run in parents.values()) == list(map(float, range(WRITERS)))
    children = {run.data.tags[POINT]: run for run in every if PARENT_TAG in run.data.tags}
    assert len(children) == WRITERS * TRIALS
    for key, run in children.items():
        writer, trial = map(int, key.split("-"))
        assert parents[run.data.tags[PARENT_TAG]].data.params["writer"] == str(writer)
        assert len(run.data.params) == 20
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "score")}
        assert points == {edits: pytest.approx(writer + trial / 10 + edits / 1000) for edits in RUNGS}
        assert len(client.get_metric_history(run.info.run_id, "curves/rel")) == 50


def test_eight_writers_of_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    check_together(f"sqlite:///{tmp_path}/mlflow.db")


def test_eight_writers_through_a_server(tmp_path: Path) -> None:
    with database(tmp_path) as backend, server(backend, tmp_path) as uri:
        check_together(uri)


def test_a_search_kept_in_the_database_goes_on(values: dict[str, Any], tmp_path: Path) -> None:
    with database(tmp_path) as address:
        search = check(from_values(values | {"storage": address}))
        asked = Points(search.config, search.space, tmp_path, "id", "study")
        first, second = asked.ask(), asked.ask()
        assert first and second
        asked.report(first, {"edits": 8, "score": 0.5})
        asked.finish(first, COMPLETE)
        again = Points(search.config, search.space, tmp_path, "id", "study")
        assert again.ask() == second and [trial.state for trial in again.trials()] == ["complete", "running"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(backend: str, folder: Path) -> Iterator[str]:
    """`mlflow server` on this machine alone."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "2", "--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.txt").open("w") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            uri = f"http://127.0.0.1:{port}"
            begun = time.monotonic()
            while not answers(f"{uri}/health"):
                assert running.poll() is None, (folder / "server.txt").read_text()
                assert time.monotonic() - begun < PATIENCE_S, "the server does not answer"
                time.sleep(0.2)
            yield uri
        finally:
            os.killpg(running.pid, 15)
            running.wait(30)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextmanager
def database(folder: Path) -> Iterator[str]:
    """A PostgreSQL of its own, where it is installed; else a file."""
    programs = postgres_programs()
    if programs is None:
        yield f"sqlite:///{folder}/server.db"
        return
    # It does not run as root.
    user = {"user": "nobody"} if os.getuid() == 0 else {}
    name, port, password = user.get("user") or "tester", free_port(), secrets.token_hex(8)
    home = Path(f"/tmp/odedit-postgres-{secrets.token_hex(4)}")  # pytest's folders are closed to others
    with ExitStack() as stack:
        home.mkdir(mode=0o755)
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        (home / "password").write_text(password)
        if user:
            shutil.chown(home, name)
        common = {"cwd": home, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **user}
        initialise = [programs / "initdb", "-D", home / "data", "-U", "tester", "--auth=scram-sha-256"]
        initialise += [f"--pwfile={home}/password", "-E", "UTF8", "--no-sync", "--locale=C"]
        done = subprocess.run(initialise, check=False, **common)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        command = [programs / "postgres", "-D", home / "data", "-p", str(port), "-k", home, "-F"]
        running = subprocess.Popen([*command, "-c", "listen_addresses=127.0.0.1"], **common)
        stack.callback(running.wait, 30)
        stack.callback(running.send_signal, 2)
        address = f"postgresql+psycopg://tester:{password}@127.0.0.1:{port}/postgres"
        wait_for(address, running)
        yield address


def wait_for(address: str, running: subprocess.Popen[bytes]) -> None:
    import psycopg

    begun = time.monotonic()
    while True:
        try:
            psycopg.connect(address.replace("+psycopg", ""), connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            assert running.poll() is None and time.monotonic() - begun < PATIENCE_S
            time.sleep(0.1)


def postgres_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    anywhere = shutil.which("initdb")
    return found[-1].parent if found else Path(anywhere).parent if anywhere else None
