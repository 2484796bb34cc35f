"""CUDA graphs: the kernels of a step, recorded once and then launched together.

A small step takes Python longer to launch, kernel by kernel, than the GPU to compute. The recorded kernels are the same
kernels on the same memory, so the numbers are the same.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import torch

SWITCH = "ODEDIT_CUDA_GRAPHS"
"""Environment variable; `0` disables CUDA graphs."""

_log = logging.getLogger(__name__)


class _ThreadState(threading.local):
    """A thread's state between recordings.

    Attributes:
        streams: Recording stream of each device. Libraries allocate memory for every stream that they have seen.
        last: Last recording of each device; the next one reuses its memory, as only the last is launched.
        has_failed: True after a failed recording, or when its memory was needed; the thread then records no more.
    """

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.last: dict[torch.device, torch.cuda.CUDAGraph] = {}
        self.has_failed = False


_state = _ThreadState()


def are_used(device: torch.device) -> bool:
    """Whether steps on this device are recorded."""
    return device.type == "cuda" and os.environ.get(SWITCH, "1") != "0" and not _state.has_failed


def forget() -> bool:
    """Frees the last recording and its memory, and disables recording in this thread.

    Returns:
        Whether there was a recording.
    """
    was_recorded = bool(_state.last)
    _state.last.clear()
    _state.has_failed = _state.has_failed or was_recorded
    return was_recorded


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """A function that launches the kernels of `work` again, on the same memory; None if they cannot be recorded.

    Recording runs the Python code without the kernels, so results exist after the first launch. Inputs must be kept
    alive, and outputs stay at their addresses. A thread launches only its last recording.

    Args:
        work: Code that has run before, so that all set-up is done. It must not wait for the device or copy from the
            host.
    """
    if device not in _state.streams:
        _state.streams[device] = torch.cuda.Stream(device)
    graph, stream, current = torch.cuda.CUDAGraph(), _state.streams[device], torch.cuda.current_stream(device)
    pool = _state.last[device].pool() if device in _state.last else None
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool, "thread_local")
            try:
                work()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        _state.has_failed = True
        _state.last.pop(device, None)
        # `capture_end` fails too after a failed recording; its context is the cause.
        reason = error.__context__ or error
        _log.warning("The kernels of a step cannot be recorded, and are launched one by one: %s", reason)
        return None
    current.wait_stream(stream)
    _state.last[device] = graph
    return graph.replay
