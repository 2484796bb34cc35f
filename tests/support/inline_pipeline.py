"""Every run in this process, as a small run on this machine is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from pipeline.workers import ray_session
from pipeline.workers.plan import Plan, make_plan


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the connection to Ray for one test."""

    @contextmanager
    def connected(
        pipeline: Any, backbone: Any, num_groups: int, console: Any = None, groups_per_actor: int = 8
    ) -> Iterator[Plan]:
        yield replace(make_plan(pipeline, backbone, 1, 0, num_groups, groups_per_actor), in_process=True)

    monkeypatch.setattr(ray_session, "connected", connected)
