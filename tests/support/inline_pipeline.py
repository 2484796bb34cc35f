"""The pipeline's stages in this process, one after the other, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from odedit.errors import InputError
from pipeline.workers import committing, graph, ray_session, training_group
from pipeline.workers.plan import Job, Plan, make_plan
from pipeline.workers.preparer import Preparer


def run_graph(
    jobs: Sequence[Job], plan: Plan, pending: Sequence[tuple[int, int]], profile: Any = None
) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Substitute for `pipeline.workers.graph.run_graph`."""
    workers: dict[int, Any] = {}
    for job, group in pending:
        if job not in workers:
            workers[job] = Preparer(jobs[job]), graph.worker_class(jobs[job])(jobs[job])
        preparer, actor = workers[job]
        yield job, group, actor(preparer(group))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the graph and the connection to Ray for one test."""

    @contextmanager
    def connected(pipeline: Any, backbone: Any, num_groups: int, console: Any = None) -> Iterator[Plan]:
        yield make_plan(pipeline, backbone, 1, 0, num_groups)

    def train(commit_job: Any, plan: Plan, num_workers: int, show: Any) -> None:
        committing.work({"commit": commit_job})
        problem = committing.failure(commit_job.job.workspace)
        if problem:
            raise InputError(problem)

    monkeypatch.setattr(training_group, "train", train)
    monkeypatch.setattr(ray_session, "connected", connected)
    monkeypatch.setattr(graph, "run_graph", run_graph)
    monkeypatch.setattr(graph, "run_task", lambda work, job, plan: work(job))
    monkeypatch.setattr(graph, "run_shares", lambda work, job, shares, plan: [work(job, share) for share in shares])
