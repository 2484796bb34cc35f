"""One tracking database, many writers: nobody's figures are lost because somebody else is writing."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

_LOCKED_S = 120.0
"""How long a write waits for other writers of a sqlite file, beyond what the database waits itself."""

T = TypeVar("T")


def patiently(call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Calls MLflow again while the store is locked by another writer."""
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
def alone(uri: str) -> Iterator[None]:
    """Inside, no other process creates the same database file: two at once would both fill in its tables."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    import fcntl

    digest = hashlib.blake2b(os.path.realpath(uri.removeprefix("sqlite:///")).encode(), digest_size=8).hexdigest()
    # Not beside the database, where it would stay; the system lets go of it whatever becomes of this process.
    with open(Path(tempfile.gettempdir()) / f"odedit-{os.getuid()}-{digest}.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
