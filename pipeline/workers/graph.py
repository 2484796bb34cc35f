"""The Ray Data graph: groups -> prepare (CPU) -> edit (actors) -> reports. The actors write the results.

One group is one block, the unit that Ray schedules, retries and loses. In a large run a block holds several groups,
since Ray's driver keeps every block's metadata until the end. The two stages request different resources, so that Ray
does not fuse them and a GPU does not wait for pictures.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.data import ActorPoolStrategy, DataContext

from odedit.errors import one_sentence
from pipeline.run_folder.rows import Row
from pipeline.workers.plan import CPUS_PER_PREPARER, Job, Plan
from pipeline.workers.profile import Profile
from pipeline.workers.stages import Editing, Fatal, GraphError, Preparing, attempted, prefix_of

MAX_BLOCKS = 256
"""Blocks of a large run with few actors; the run reports its progress once per block. A block takes the driver some 35
ms, however many records it has."""
MAX_BLOCKS_PER_ACTOR = 32
"""More blocks when there are more actors, so that the tail, one actor busy and the others idle, stays short."""


def run_graph(
    jobs: Sequence[Job], plan: Plan, pending: Sequence[tuple[int, int]], profile: Profile | None = None
) -> Generator[tuple[int, int, list[Row]]]:
    """Edits groups of one or many runs; yields index of the job, number and reported rows of each finished group.

    Several runs in one graph share the workers and the loaded model: starting a worker takes longer than a small run.

    Args:
        jobs: One job for each run.
        plan: Number and resources of the workers.
        pending: Groups to edit, as index of the job and number of the group; edited in about this order.
        profile: Profile that the jobs' times are added to.

    Raises:
        InputError: The settings do not fit the model.
        GraphError: A worker cannot start, or Ray failed.
    """
    _quiet()
    num_actors, num_preparers = (min(number, len(pending)) for number in (plan.num_actors, plan.num_preparers))
    num_blocks = min(len(pending), max(MAX_BLOCKS, MAX_BLOCKS_PER_ACTOR * num_actors))
    reports = (
        ray.data.from_items([{"job": job, "group": group} for job, group in pending], override_num_blocks=num_blocks)
        .map_batches(
            PrepareStage,
            fn_constructor_args=(tuple(jobs),),
            batch_size=1,
            num_cpus=CPUS_PER_PREPARER,
            compute=ActorPoolStrategy(size=num_preparers),
        )
        .map_batches(
            EditStage,
            fn_constructor_args=(tuple(jobs),),
            batch_size=1,
            num_cpus=plan.cpus_per_actor,
            num_gpus=plan.gpus_per_actor or None,
            compute=ActorPoolStrategy(size=num_actors),
        )
    )
    for report in _rows(reports):
        raise_fatal(report, jobs)
        rows = json.loads(report["rows"])
        if profile is not None:
            profile.add(json.loads(report["seconds"]), len(rows))
        yield int(report["job"]), int(report["group"]), rows


def run_task(work: Callable[[Job], None], job: Job, plan: Plan) -> None:
    """Runs `work` once, with the resources of one actor.

    Raises:
        InputError: Raised by `work`.
        GraphError: `work` failed otherwise, or its worker died again and again.
    """
    task = ray.remote(attempted).options(num_cpus=plan.cpus_per_actor, num_gpus=plan.gpus_per_actor or None)
    try:
        fatal: Fatal | None = ray.get(task.remote(work, job))
    except ray.exceptions.RayError as error:
        raise GraphError(f"Ray ended the run: {one_sentence(error)}") from error
    if fatal is not None:
        raise fatal.error()


def run_shares(work: Callable[[Job, int], None], job: Job, shares: Sequence[int], plan: Plan) -> None:
    """Runs `work` for every share, as many at a time as there are actors.

    Raises:
        InputError: Raised by `work`.
        GraphError: `work` failed otherwise, or a worker died again and again.
    """
    _quiet()
    reports = ray.data.from_items([{"share": share} for share in shares], override_num_blocks=len(shares)).map_batches(
        ShareStage,
        fn_constructor_args=(work, job),
        batch_size=1,
        num_cpus=plan.cpus_per_actor,
        num_gpus=plan.gpus_per_actor or None,
        compute=ActorPoolStrategy(size=min(plan.num_actors, len(shares))),
    )
    for report in _rows(reports):
        raise_fatal(report | {"job": 0}, (job,))


class ShareStage:
    """`{"share"}` -> the report of its work."""

    def __init__(self, work: Callable[[Job, int], None], job: Job) -> None:
        self._work, self._job = work, job

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        share = int(batch["share"][0])

        def work(job: Job) -> None:
            self._work(job, share)

        work.__name__ = f"share-{share}"
        fatal = attempted(work, self._job)
        return {"fatal": ["" if fatal is None else fatal.message], "is_input": [fatal is not None and fatal.is_input]}


def raise_fatal(report: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Raises the failure of a report, if it holds one."""
    if report["fatal"]:
        raise Fatal(report["fatal"], bool(report["is_input"])).error(prefix_of(jobs, int(report["job"])))


def _rows(reports: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from reports.iter_rows()
    except ray.exceptions.RayError as error:
        raise GraphError(f"Ray ended the run: {one_sentence(error)}") from error


class PrepareStage(Preparing):
    """`{"job", "group"}` -> `{"job", "prepared", "seconds"}`; pickled, since a request is not a table."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        index, group = int(batch["job"][0]), int(batch["group"][0])
        with self.timed(index) as seconds:
            prepared = cloudpickle.dumps(self.prepared(index, group), protocol=5)
        return {"job": [index], "prepared": [prepared], "seconds": [json.dumps(seconds)]}


class EditStage(Editing):
    """`{"job", "prepared", "seconds"}` -> one report per group."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        index = int(batch["job"][0])
        with self.timed(index) as seconds:
            prepared = cloudpickle.loads(batch["prepared"][0])
            result = self.edited(index, prepared)
        is_fatal = isinstance(result, Fatal)
        return {
            "job": [index],
            "group": [-1 if is_fatal else prepared.group],
            "rows": [json.dumps([] if is_fatal else result)],
            "fatal": [result.message if isinstance(result, Fatal) else ""],
            "is_input": [isinstance(result, Fatal) and result.is_input],
            "seconds": [json.dumps(json.loads(batch["seconds"][0]) | seconds)],
        }


def _quiet() -> None:
    """Turns off the progress bars and messages of Ray Data."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
