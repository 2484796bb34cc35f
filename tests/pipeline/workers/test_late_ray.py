"""A Ray that does not start in time is started again, and in the end told in a sentence."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from odedit.errors import Explained
from pipeline.config.run import BackboneConfig, PipelineConfig
from pipeline.workers import ray_session
from pipeline.workers.plan import make_plan

LATE = "The current node timed out during startup. This could happen because ..."


def started(outcomes: list[str]) -> int:
    """Number of tries of a Ray whose starts end so: the text of an exception, or nothing."""
    left = [*outcomes]

    def init(**settings: Any) -> None:
        if text := left.pop(0):
            raise Exception(text)

    try:
        ray_session._start(SimpleNamespace(init=init), make_plan(PipelineConfig(), BackboneConfig(), 2, 0, 1))
    finally:
        ray_session._remove_session()
    return len(outcomes) - len(left)


def test_a_ray_that_starts_too_late_is_started_again() -> None:
    assert started(["", ""]) == 1
    assert started([LATE, LATE, ""]) == 3
    with pytest.raises(Explained, match="3 tries of 30 seconds: the machine is too busy"):
        started([LATE, LATE, LATE, ""])
    with pytest.raises(Exception, match="something else") as caught:
        started([LATE, "something else", ""])
    assert type(caught.value) is Exception


def test_what_a_late_start_leaves_is_ended() -> None:
    left: list[subprocess.Popen[bytes]] = []
    own = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def init(**settings: Any) -> None:
        if not left:
            folder = settings["_temp_dir"]
            left.append(subprocess.Popen([sys.executable, "-c", "input()", folder], stdin=subprocess.PIPE))
            raise Exception(LATE)

    ray_session._start(SimpleNamespace(init=init), make_plan(PipelineConfig(), BackboneConfig(), 2, 0, 1))
    ray_session._remove_session()
    assert not psutil.pid_exists(left[0].pid) and own.poll() is None
    own.kill()
    own.wait()
