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

_local = threading.local()
_log = logging.getLogger(__name__)


def are_used(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get(SWITCH, "1") != "0" and not getattr(_local, "failed", False)


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """What starts the kernels of `work` again, on the memory that they have now; None if they cannot be recorded.

    Recording runs Python, not the kernels: what `work` computes is there after the first start. What it reads must be
    kept as long as it may be started, and what it keeps itself stays where it is.

    Args:
        work: Has run before, so that nothing is left to be set up; must not wait for the device or copy from the host.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Memory of the last one is used again: nobody starts that any more.
    last = getattr(_local, "last", None)
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=None if last is None else last.pool(), capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        _local.failed, _local.last = True, None
        _log.warning("kernels of a step cannot be recorded, and are started one by one: %s", error)
        return None
    torch.cuda.current_stream(device).wait_stream(stream)
    _local.last = graph
    return graph.replay
