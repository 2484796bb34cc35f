"""A real MLflow server, for this machine alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(backend: str, folder: Path) -> Iterator[str]:
    """`mlflow server` before a database, with its artifacts in the folder; yields the address."""
    one = Server(backend, folder)
    one.start()
    try:
        yield one.uri
    finally:
        one.stop()


class Server:
    """May be stopped and started again, at the same address."""

    def __init__(self, backend: str, folder: Path, workers: int = 2) -> None:
        self._port = free_port()
        self._log = folder / "server.txt"
        self._command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend]
        self._command += ["--host", "127.0.0.1", "--port", str(self._port), "--workers", str(workers)]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        self._running: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self._log.open("w") as log:
            self._running = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        begun = time.monotonic()
        while not _answers(f"{self.uri}/health"):
            if self._running.poll() is not None or time.monotonic() - begun > _PATIENCE_S:
                self.stop()
                raise RuntimeError(f"The server does not answer:\n{self._log.read_text()}")
            time.sleep(0.2)

    def stop(self, number: int = 15) -> None:
        """Ends all its processes with a signal; nothing if it does not run."""
        if self._running is not None:
            if self._running.poll() is None:
                os.killpg(self._running.pid, number)
            self._running.wait(30)
            self._running = None


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
