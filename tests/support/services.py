"""Local services for tests: an MLflow server, and a database for it."""

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
from pathlib import Path

PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextmanager
def server(backend: str, folder: Path, password: str | None = None) -> Iterator[str]:
    """A local `mlflow server`; with a password, only for the user `admin`."""
    mlflow = Server(backend, folder, password)
    try:
        mlflow.start()
        yield mlflow.uri
    finally:
        mlflow.stop()


class Server:
    """The server of `server`, which can be stopped and restarted at the same address."""

    def __init__(self, backend: str, folder: Path, password: str | None = None) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self._log = folder / "server.txt"
        self._command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend]
        self._command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        self._environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._running: subprocess.Popen[bytes] | None = None
        if password is not None:
            config = folder / "auth.ini"
            config.write_text(
                "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\n"
                f"admin_password = {password}\ndatabase_uri = sqlite:///{folder / 'users.db'}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            self._command += ["--app-name", "basic-auth"]
            self._environment["MLFLOW_AUTH_CONFIG_PATH"] = str(config)
            self._environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(16)

    def start(self) -> None:
        with self._log.open("w") as log:
            self._running = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        begun = time.monotonic()
        while not answers(f"{self.uri}/health"):
            assert self._running.poll() is None, self._log.read_text()
            assert time.monotonic() - begun < PATIENCE_S, "the server does not answer"
            time.sleep(0.2)

    def stop(self, number: int = 15) -> None:
        """Ends all processes of the server with a signal, if it runs."""
        if self._running is not None:
            if self._running.poll() is None:
                os.killpg(self._running.pid, number)
            self._running.wait(30)
            self._running = None


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextmanager
def database(folder: Path) -> Iterator[str]:
    """A PostgreSQL server if it is installed, else an SQLite file."""
    programs = postgres_programs()
    if programs is None:
        yield f"sqlite:///{folder}/server.db"
        return
    # PostgreSQL does not run as root.
    user = {"user": "nobody"} if os.getuid() == 0 else {}
    name, port, password = user.get("user") or "tester", free_port(), secrets.token_hex(8)
    home = Path(f"/tmp/odedit-postgres-{secrets.token_hex(4)}")  # other users cannot enter pytest's folders
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
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return installed[-1].parent if installed else Path(on_path).parent if on_path else None
