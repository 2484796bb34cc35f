"""Retries of storage operations that fail with a transient error."""

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
"""Seconds after the first attempt during which an operation is retried, the clients' own retries included."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0

_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "EREMOTEIO", "ETIMEDOUT", "EAGAIN", "EBUSY", "EPIPE", "ECONNRESET", "ECONNREFUSED",
        "ECONNABORTED", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET",
    )
    if hasattr(errno, name)
}  # fmt: skip
# pyarrow's clients of S3, Google Cloud Storage and Azure report the cause in the message only.
_TRANSIENT_TEXT = re.compile(
    r"HTTP status (?:5(?!01|05|07)\d\d|408|429)\b|\b(?:SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|INTERNAL_ERROR"
    r"|REQUEST_TIMEOUT|THROTTLING|NETWORK_CONNECTION|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
    r"|ServerBusy|OperationTimedOut|InternalError)\b|[Cc]onnection (?:reset|refused|timed out)|[Tt]imeout was reached"
)

T = TypeVar("T")


class _OutageLog:
    """Logs one warning per outage, however many threads retry."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def warn(self, error: OSError, limit: float) -> None:
        now = time.monotonic()
        with self._lock:
            is_new, self._quiet_until = now >= self._quiet_until, now + PATIENCE_S
        if is_new:
            _log.warning("The storage refuses for now (%s); trying again for up to %.0f s.", reason(error), limit)


_outages = _OutageLog()
_log = logging.getLogger(__name__)


def is_transient(error: OSError) -> bool:
    """True when a retry may succeed: not for a full disk, a missing permission or a missing bucket.

    >>> is_transient(OSError(errno.ESTALE, "Stale file handle")), is_transient(OSError(errno.ENOSPC, "No space left"))
    (True, False)
    >>> is_transient(OSError("When reading key 'a' in bucket 'b': AWS Error SLOW_DOWN during PutObject operation"))
    True
    >>> is_transient(OSError("When reading key 'a' in bucket 'b': AWS Error ACCESS_DENIED during PutObject operation"))
    False
    """
    if error.errno is not None:
        return error.errno in _TRANSIENT
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(_TRANSIENT_TEXT.search(str(error)))


def retried(act: Callable[[], T], patience_s: float | None = None) -> T:
    """Calls `act` until it succeeds, with exponential backoff after transient errors, and returns its result.

    Args:
        act: Operation, restarted from scratch at each call.
        patience_s: Seconds of retries; None: `PATIENCE_S`; 0: no retries.

    Raises:
        OSError: A permanent error at once, or the last transient one.
    """
    limit = PATIENCE_S if patience_s is None else patience_s
    started, wait = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return act()
        except OSError as error:
            if not is_transient(error) or time.monotonic() + wait > started + limit:
                raise
            _outages.warn(error, limit)
        # Jitter: many workers fail at the same moment.
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, LONGEST_WAIT_S)
