"""Runs with known secrets on a real cluster, then searches all files, logs, databases and command lines for them."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil
import pytest
import yaml
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from tests.support.mmedit_files import record, write_array, write_images
from tests.support.nodes import Cluster, two_nodes
from tests.support.object_store import BUCKET, ObjectStore
from tests.support.services import database, free_port, server

COMMAND_S = 800.0
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
APIS = (
    "api/jobs/", "logical/actors", "nodes?view=summary", "api/cluster_status",
    *(f"api/v0/{kind}?detail=1&limit=10000" for kind in ("actors", "jobs", "tasks", "workers", "nodes", "runtime_envs",
                                                         "objects", "placement_groups", "cluster_events")),
)  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


class Store(ObjectStore):
    """Object store that records the session token of every request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens: dict[str, list[str]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.tokens.setdefault(environ.get("HTTP_X_AMZ_SECURITY_TOKEN", ""), []).append(request)
        return super().__call__(environ, start_response)


def keys() -> dict[str, str]:
    return {name: secrets.token_hex(20) for name in KEYS}


class Watch:
    """Records the command lines of all processes, as `ps` shows them."""

    def __init__(self) -> None:
        self.lines: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        seen: Counter[int] = Counter()
        while not self._ended.wait(0.3):
            for number in psutil.pids():
                seen[number] += 1
                # The first seconds are enough: a process of Ray changes its command line once, soon after its start.
                if seen[number] < 20:
                    with suppress(OSError):
                        line = Path(f"/proc/{number}/cmdline").read_bytes()
                        self.lines.add(line.replace(b"\0", b" ").decode(errors="replace"))


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store(free_port())
    store.start()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{store.port}/{BUCKET}", method="PUT")).close()
    yield store
    store.stop()
    s3_backends.reset()


def settings(folder: Path, tracking: str) -> dict[str, Any]:
    records = [record(number) for number in range(3)]
    image_root, rephrase_root = write_images(folder, records)
    write_array(folder / "records.json", records[:2])
    write_array(folder / "others.json", records[2:])
    return {
        "data": {"path": "records.json", "image_root": image_root.name, "rephrase_root": rephrase_root.name},
        "supervision": {"locality_source": "record"},
        "editor": {"name": "ftl", "sites": ["layers.2.ffn.out"], "max_steps": 1},
        "objective": {"name": "native"},
        "evaluation": {"generate": False, "mmedit": False},
        "pipeline": {"batch_size": 2, "actors": 1, "threads_per_actor": 1, "preparers": 1},
        "tracking": {"uri": tracking},
    }


def write(path: Path, values: Mapping[str, Any]) -> None:
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(dict(values)))


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def write_settings(folder: Path, mlflow: str, password: str, storage: str) -> None:
    """Writes the files of a run, a search and a study, with passwords, and without them for `submit`."""
    for ending, uri, store_of_points in (
        ("", mlflow.replace("://", f"://admin:{password}@"), storage),
        ("-job", mlflow, storage.replace(f":{password_of(storage)}@", "@")),
    ):
        values = settings(folder, uri)
        trial = values | {"pipeline": without(values["pipeline"], "actors", "preparers")}
        write(folder / f"run{ending}.yaml", values)
        write(
            folder / f"search{ending}.yaml",
            {
                "settings": trial | {"keep_edits": False},
                "validation": {"path": "others.json"},
                "space": {"editor.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
                "rungs": {"edits": 1, "factor": 2, "number": 1},
                "trials": 1,
                "concurrent": 1,
                "storage": store_of_points,
            },
        )
        arms = {"native": {}, "slow": {"editor": {"learning_rate": 1e-4}}}
        write(
            folder / f"study{ending}.yaml",
            {
                "draw": None,
                "settings": values | {"keep_edits": False},
                "axes": {"objective": arms, "editor": None},
                "columns": ["rel"],
                "plot": {"kind": "dots", "y": "objective", "colour": None, "columns": ["rel"]},
            },
        )


def password_of(address: str) -> str:
    """Password in an address; empty without PostgreSQL."""
    return address.split("@")[0].rpartition(":")[2] if "@" in address else ""


def finish(running: Mapping[str, subprocess.Popen[str]]) -> dict[str, str]:
    """Waits for commands and returns their outputs."""
    outputs = {name: process.communicate(timeout=COMMAND_S)[0] for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, f"{name}\n{outputs[name][-5000:]}"
    return outputs


def answers(cluster: Cluster) -> dict[str, str]:
    """Responses of the dashboard's APIs."""
    texts = {}
    for api in APIS:
        headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
        try:
            reply = urllib.request.urlopen(urllib.request.Request(f"{cluster.address}/{api}", headers=headers))
        except HTTPError as error:
            reply = error
        with reply:
            texts[api] = reply.read().decode()
    assert all("odedit" in texts[api] for api in ("api/jobs/", "api/v0/jobs?detail=1&limit=10000"))
    return texts


def rows_of(address: str) -> str:
    """All rows of a PostgreSQL database, as text."""
    if not address.startswith("postgresql"):
        return ""
    import psycopg
    from psycopg import sql

    with psycopg.connect(address.replace("+psycopg", "")) as connection:
        names = connection.execute("select table_name from information_schema.tables where table_schema = 'public'")
        texts = [sql.SQL("select t::text from {} t").format(sql.Identifier(name)) for (name,) in names.fetchall()]
        return "\n".join(row for text in texts for (row,) in connection.execute(text).fetchall())


def test_secrets_are_found_nowhere(store: Store, tmp_path: Path) -> None:
    folder, home, other = tmp_path / "user", tmp_path / "mlflow", tmp_path / "points"
    for new in (folder, home, other):
        new.mkdir()
    on_nodes, handed_on, password = keys(), keys(), secrets.token_hex(16)
    common = {name: value for name, value in store.environment.items() if name not in KEYS}
    with (
        database(other) as storage,
        server(f"sqlite:///{home / 'mlflow.db'}", home, password) as mlflow,
        two_nodes(cpus=4, **common, **on_nodes) as cluster,
        Watch() as watch,
    ):
        write_settings(folder, mlflow, password, storage)
        # The image's environment without RAY_AUTH_MODE, which a driver on another machine has to detect.
        environment = without(cluster.environment, "RAY_AUTH_MODE")
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)

        def odedit(*arguments: str, **variables: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "odedit", *arguments]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            return subprocess.Popen(command, cwd=folder, env=environment | variables, **streams)  # type: ignore

        address = f"pipeline.ray_address={cluster.gcs}"
        outputs = finish(
            {
                "edit": odedit("edit", "--config", "run.yaml", address, f"out=s3://{BUCKET}/run"),
                "tune": odedit(
                    "tune", "--config", "search.yaml", f"settings.{address}", "--out", f"s3://{BUCKET}/search"
                ),
                "study": odedit(
                    "study", "memory", "--config", "study.yaml", f"settings.{address}", "--out", f"s3://{BUCKET}/study"
                ),
            }
        )
        login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
        login |= {"PGPASSWORD": password_of(storage)}
        send = ["submit", "--address", cluster.address, *(f"--env={name}" for name in (*KEYS, *login)), "--"]
        variables = handed_on | login
        refused = odedit("submit", "--address", cluster.address, "--", "edit", "--config", "run.yaml", "out=/nowhere")
        outputs |= finish(
            {
                "edit as a job": odedit(
                    *send, "edit", "--config", "run-job.yaml", f"out=s3://{BUCKET}/run-job", **variables
                ),
                "tune as a job": odedit(
                    *send, "tune", "--config", "search-job.yaml", "--out", f"s3://{BUCKET}/search-job", **variables
                ),
            }
        )
        outputs["refused"] = refused.communicate(timeout=COMMAND_S)[0]
        assert refused.returncode == 2 and "tracking.uri: an address holds a password" in outputs["refused"]
        responses, rows = answers(cluster), rows_of(storage)
        files = below(Path(cluster.environment["RAY_TMPDIR_OF_TEST"]))
        logs = [name for name in files if name.endswith("runtime_env_agent.log")]
        assert len(logs) >= 2 and len([name for name in files if "job-driver" in name]) == 2

    # Workers of jobs use the keys of --env, all others those of their node.
    for prefix, used in (("run-job", handed_on), ("search-job", handed_on), ("run", on_nodes), ("search", on_nodes)):
        written = [text for text in store.tokens[used["AWS_SESSION_TOKEN"]] if f"PUT /{BUCKET}/{prefix}/" in text]
        assert any("/results/" in text for text in written), prefix
    files |= without(below(folder), *(str(file) for file in folder.glob("*.yaml"))) | below(home) | below(other)
    files.pop(str(home / "auth.ini"))
    stored = {name: key.value for name, key in s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys.items()}
    assert len(files) > 100 and len(stored) > 50 and len(watch.lines) > 20
    places = {
        **files,
        **stored,
        **{f"output of {name}": text.encode() for name, text in outputs.items()},
        **{f"dashboard {name}": text.encode() for name, text in responses.items()},
        **{f"ps {number}": line.encode() for number, line in enumerate(sorted(watch.lines))},
        "rows": rows.encode(),
    }
    planted = {f"{name} of the nodes": value for name, value in on_nodes.items()}
    planted |= {f"{name} of the job": value for name, value in handed_on.items()}
    planted |= {"MLflow's password": password, "Ray's token": cluster.environment["RAY_AUTH_TOKEN"]}
    planted |= {"the database's password": password_of(storage)} if password_of(storage) else {}
    planted["MLflow's login"] = base64.b64encode(f"admin:{password}".encode()).decode()
    leaks = [
        (what, where) for what, text in planted.items() for where, content in places.items() if text.encode() in content
    ]
    assert not leaks, json.dumps(leaks, indent=1)


def below(folder: Path) -> dict[str, bytes]:
    """Contents of the files below a folder, by path."""
    contents = {}
    for file in folder.rglob("*"):
        with suppress(OSError):  # a socket, or a file that is being deleted
            if file.is_file():
                contents[str(file)] = file.read_bytes()
    return contents
