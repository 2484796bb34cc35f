"""CUDA graphs: a step's kernels, recorded once and then started together.

A small step keeps a GPU busy for a fraction of the time that it takes Python to start its kernels one by one. Recorded,
they are the same kernels on the same memory, hence the same numbers.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import torch

SWITCH = "ODEDIT_CUDA_GRAPHS"
"""Environment variable: `0` starts every kernel by itself."""

_log = logging.getLogger(__name__)


class _OfThread(threading.local):
    """What a thread keeps from one recording to the next.

    Attributes:
        streams: What it records on, by device; libraries keep memory for every stream that they have met.
        last: The last recording; its memory serves the next one, since nobody starts it any more.
        has_failed: Or takes memory that is needed: then it is not tried again.
    """

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.last: dict[torch.device, torch.cuda.CUDAGraph] = {}
        self.has_failed = False


_kept = _OfThread()


def are_used(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get(SWITCH, "1") != "0" and not _kept.has_failed


def forget() -> bool:
    """Lets go of the last recording and of the memory that it holds, and records no more in this thread.

    Returns:
        Whether there was one.
    """
    was_kept = bool(_kept.last)
    _kept.last.clear()
    _kept.has_failed = _kept.has_failed or was_kept
    return was_kept


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """What starts the kernels of `work` again, on the memory that they have now; None if they cannot be recorded.

    Recording runs Python, not the kernels: what `work` computes is there after the first start. What it reads must be
    kept as long as it may be started, and what it keeps itself stays where it is. A thread starts its last recording
    only.

    Args:
        work: Has run before, so that nothing is left to be set up; must not wait for the device or copy from the host.
    """
    if device not in _kept.streams:
        _kept.streams[device] = torch.cuda.Stream(device)
    graph, stream, here = torch.cuda.CUDAGraph(), _kept.streams[device], torch.cuda.current_stream(device)
    pool = _kept.last[device].pool() if device in _kept.last else None
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool, "thread_local")
            try:
                work()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        _kept.has_failed = True
        _kept.last.pop(device, None)
        # The end of a recording that has failed fails as well.
        reason = error.__context__ or error
        _log.warning("The kernels of a step cannot be recorded, and are started one by one: %s", reason)
        return None
    here.wait_stream(stream)
    _kept.last[device] = graph
    return graph.replay
