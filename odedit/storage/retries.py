"""Waits out a storage that refuses for a while: a minute of it shall not end a run of hours."""

from __future__ import annotations

import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from odedit.runtime.addresses import reason

PATIENCE_S = 60.0
"""How long after the first refusal something is tried again. What clients of object stores try by themselves is part
of it."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0

_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "EREMOTEIO", "ETIMEDOUT", "EAGAIN", "EBUSY", "EPIPE", "ECONNRESET", "ECONNREFUSED",
        "ECONNABORTED", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET",
    )
    if hasattr(errno, name)
}  # fmt: skip
# Clients of object stores put what happened into words: pyarrow's of S3, of Google's and of Azure's.
_PASSING_TEXT = re.compile(
    r"HTTP status (?:5(?!01|05|07)\d\d|408|429)\b|\b(?:SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|INTERNAL_ERROR"
    r"|REQUEST_TIMEOUT|THROTTLING|NETWORK_CONNECTION|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
    r"|ServerBusy|OperationTimedOut|InternalError)\b|[Cc]onnection (?:reset|refused|timed out)|[Tt]imeout was reached"
)

T = TypeVar("T")


class _Told:
    """One line of the log for each time that a storage is out, however many threads wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def tell(self, error: OSError, limit: float) -> None:
        now = time.monotonic()
        with self._lock:
            is_new, self._quiet_until = now >= self._quiet_until, now + PATIENCE_S
        if is_new:
            _log.warning("The storage refuses for now (%s); trying again for up to %.0f s.", reason(error), limit)


_told = _Told()
_log = logging.getLogger(__name__)


def is_passing(error: OSError) -> bool:
    """Whether the same may work a little later: a full disk, a missing right or a missing bucket does not pass.

    >>> is_passing(OSError(errno.ESTALE, "Stale file handle")), is_passing(OSError(errno.ENOSPC, "No space left"))
    (True, False)
    >>> is_passing(OSError("When reading key 'a' in bucket 'b': AWS Error SLOW_DOWN during PutObject operation"))
    True
    >>> is_passing(OSError("When reading key 'a' in bucket 'b': AWS Error ACCESS_DENIED during PutObject operation"))
    False
    """
    if error.errno is not None:
        return error.errno in _PASSING
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(_PASSING_TEXT.search(str(error)))


def retried(act: Callable[[], T], patience_s: float | None = None) -> T:
    """What `act` returns, which is done again, after growing waits, while it fails with what may pass.

    Args:
        act: Does the whole thing anew at each call.
        patience_s: Instead of `PATIENCE_S`; 0: once.

    Raises:
        OSError: As `act` raises it: at once if it does not pass, else the last one.
    """
    limit = PATIENCE_S if patience_s is None else patience_s
    started, wait = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return act()
        except OSError as error:
            if not is_passing(error) or time.monotonic() + wait > started + limit:
                raise
            _told.tell(error, limit)
        # Not all at the same moment: many workers have been refused together.
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, LONGEST_WAIT_S)
