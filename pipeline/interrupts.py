"""Ctrl-C and SIGTERM: one way to ask a command for its end, and none of them forgotten."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_depth = 0
_is_interrupted = False


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM ends the run as Ctrl-C does: Ray is stopped, the MLflow run closed, and no result is lost.

    A signal may come while code of some library runs that lets no exception out, such as a destructor; it is not
    forgotten until the outermost of these blocks ends: see `raise_if_interrupted`. What fails because of
    it, such as a lock that is let go of before it was held, is taken for the interruption that it is.
    """
    global _depth, _is_interrupted
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _is_interrupted
        _is_interrupted = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    _depth += 1
    try:
        yield
    except Exception as error:
        if _is_interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        _depth -= 1
        for number, handler in before.items():
            signal.signal(number, handler)
        if not _depth:
            _is_interrupted = False


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt if the user has asked for the end, and whoever heard of it first kept it to himself."""
    if _is_interrupted:
        raise KeyboardInterrupt
