"""Work on the plan's workers: Ray's, or the command's own process. Ray is imported only if it is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from pipeline.run_folder.rows import Row
from pipeline.workers.committing import CommitJob
from pipeline.workers.plan import Job, Plan
from pipeline.workers.profile import Profile


def run_groups(
    jobs: Sequence[Job], plan: Plan, pending: Sequence[tuple[int, int]], profile: Profile | None = None
) -> Generator[tuple[int, int, list[Row]]]:
    """Edits groups; see `pipeline.workers.graph.run_graph`."""
    if plan.in_process:
        from pipeline.workers import in_process

        return in_process.run_groups(jobs, pending, profile)
    from pipeline.workers import graph

    return graph.run_graph(jobs, plan, pending, profile)


def run_task(work: Callable[[Job], None], job: Job, plan: Plan) -> None:
    """Runs `work` once; see `pipeline.workers.graph.run_task`."""
    if plan.in_process:
        from pipeline.workers import in_process

        in_process.run_task(work, job)
    else:
        from pipeline.workers import graph

        graph.run_task(work, job, plan)


def train(commit_job: CommitJob, plan: Plan, num_workers: int, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Makes one model; see `pipeline.workers.training_group.train`."""
    if plan.in_process:
        from pipeline.workers import in_process

        in_process.train(commit_job, show)
    else:
        from pipeline.workers import training_group

        training_group.train(commit_job, plan, num_workers, show)


def run_shares(work: Callable[[Job, int], None], job: Job, shares: Sequence[int], plan: Plan) -> None:
    """Runs `work` for every share; see `pipeline.workers.graph.run_shares`."""
    if plan.in_process:
        from pipeline.workers import in_process

        def every(job: Job) -> None:
            for share in shares:
                work(job, share)

        in_process.run_task(every, job)
    else:
        from pipeline.workers import graph

        graph.run_shares(work, job, shares, plan)
