"""Seconds by stage of the work, if `measured`.

A nested stage's time is subtracted from the outer stage, so that all stages add up to the total.
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
    """Seconds by stage, in the order of their first occurrence."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)


_account: ContextVar[Account | None] = ContextVar("account", default=None)


@contextmanager
def measured() -> Iterator[Account]:
    """Times stages inside the block. On a GPU each stage waits for its kernels, which slows the work."""
    account = Account()
    token = _account.set(account)
    try:
        yield account
    finally:
        _account.reset(token)


@contextmanager
def unmeasured() -> Iterator[None]:
    """Disables timing inside the block, for code that must not wait for a GPU."""
    token = _account.set(None)
    try:
        yield
    finally:
        _account.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Adds the block's time to a stage; almost free unless `measured`."""
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
