"""Handling of Ctrl-C and SIGTERM: both end a command in the same way, and no signal is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_depth = 0
_blocks = 0
_is_interrupted = False
_is_delayed = False


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt inside the block on SIGTERM as on Ctrl-C, so that Ray and the MLflow run are closed.

    A library may swallow that exception, in a destructor say; `raise_if_interrupted` then raises it again, until the
    outermost block ends. Other exceptions after a signal become KeyboardInterrupt: the signal may have caused them.
    """
    global _depth, _is_interrupted
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _is_interrupted, _is_delayed
        _is_interrupted = True
        if _blocks and not _is_delayed:
            _is_delayed = True
            return
        _is_delayed = False
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
    """Raises KeyboardInterrupt if a signal arrived and its exception was swallowed (in a destructor, say)."""
    if _is_interrupted:
        raise KeyboardInterrupt


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Delays the KeyboardInterrupt of `terminate_as_interrupt` to the end of the block; a second signal raises at once.

    An exception in the middle of a database transaction can leave it open, and the database locked for this process's
    own later writes.
    """
    global _blocks, _is_delayed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if _is_delayed and not _blocks:
            _is_delayed = False
            raise KeyboardInterrupt
