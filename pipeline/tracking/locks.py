"""Tracking databases: concurrent writes of several processes, and calls that no signal breaks off."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipeline.interrupts import interrupts_delayed
from pipeline.run_folder.lock import temporary_file

_LOCKED_S = 120.0
"""Seconds that a write waits for other writers of an sqlite file, after the database's own timeout."""

T = TypeVar("T")


def patiently(call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Calls an MLflow function, with retries while another writer has locked the database."""
    started, pause = time.monotonic(), 0.1
    while True:
        try:
            return call(*arguments, **named)
        except Exception as error:
            if "database is locked" not in str(error) or time.monotonic() - started > _LOCKED_S:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 3.0)


@contextmanager
def creation_lock(uri: str) -> Iterator[None]:
    """Inside, no other process creates the same database file: two processes would both create its tables."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    # In the temporary folder, since the lock file stays. The system releases the lock when this process ends.
    with open(temporary_file(os.path.realpath(uri.removeprefix("sqlite:///"))), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class WholeCalls:
    """A client of a database whose calls are not broken off by Ctrl-C or SIGTERM: these are delayed to their end."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute):
            return attribute

        def whole(*arguments: Any, **named: Any) -> Any:
            with interrupts_delayed():
                return attribute(*arguments, **named)

        return whole
