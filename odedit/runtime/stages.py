"""Where the time goes: seconds by stage of the work, while somebody asks for them.

A stage inside another is not counted for the outer one, so that all of them add up to what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass
class Account:
    """Seconds by stage, in the order in which the stages first came."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)


_account: ContextVar[Account | None] = ContextVar("account", default=None)


@contextmanager
def measured() -> Iterator[Account]:
    """Inside, stages are timed. On a GPU each waits for its kernels, which costs some of the speed it measures."""
    account = Account()
    token = _account.set(account)
    try:
        yield account
    finally:
        _account.reset(token)


@contextmanager
def unmeasured() -> Iterator[None]:
    """Inside, no stage is timed: where nothing may wait for a GPU."""
    token = _account.set(None)
    try:
        yield
    finally:
        _account.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Books the time of the block; costs next to nothing unless `measured`."""
    account = _account.get()
    if account is None:
        yield
        return
    account.seconds.setdefault(name, 0.0)
    account._inner.append(0.0)
    started = _now()
    try:
        yield
    finally:
        elapsed = _now() - started
        account.seconds[name] += elapsed - account._inner.pop()
        if account._inner:
            account._inner[-1] += elapsed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
