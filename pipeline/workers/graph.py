"""The Ray Data graph: groups -> prepare (CPU) -> edit (actors) -> reports. The actors write the results.

One group is one block, the unit that Ray schedules, retries and loses. In a large run a block holds several groups,
since Ray's driver keeps every block's metadata until the end. The two stages request different resources, so that Ray
does not fuse them and a GPU does not wait for pictures.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.data import ActorPoolStrategy, DataContext

from odedit.errors import Explained, InputError, StorageError, one_sentence
from odedit.runtime.stages import stage
from pipeline.run_folder.rows import Row
from pipeline.workers.editor import EditActor
from pipeline.workers.group import GroupWorker
from pipeline.workers.plan import CPUS_PER_PREPARER, Job, Plan
from pipeline.workers.preparer import Preparer, write_traceback
from pipeline.workers.profile import EDIT, LOADING, OTHER, PREPARE, Clock, Profile
from pipeline.workers.request_cache import RequestCache
from pipeline.workers.scoring import ScoreActor

MAX_BLOCKS = 512
"""Blocks of a large run with few actors; the run reports its progress once per block."""
MAX_BLOCKS_PER_ACTOR = 64
"""More blocks when there are more actors, so that the tail, one actor busy and the others idle, stays short."""


class GraphError(Explained, RuntimeError):
    """The run cannot continue; the message is one sentence."""


def run_graph(
    jobs: Sequence[Job], plan: Plan, pending: Sequence[tuple[int, int]], profile: Profile | None = None
) -> Iterator[tuple[int, int, list[Row]]]:
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
            profile.add(report["seconds"], len(rows))
        yield int(report["job"]), int(report["group"]), rows


def run_task(work: Callable[[Job], None], job: Job, plan: Plan) -> None:
    """Runs `work` once, with the resources of one actor.

    Raises:
        InputError: Raised by `work`.
        GraphError: `work` failed otherwise, or its worker died again and again.
    """
    task = ray.remote(_reported).options(num_cpus=plan.cpus_per_actor, num_gpus=plan.gpus_per_actor or None)
    try:
        report = ray.get(task.remote(work, job))
    except ray.exceptions.RayError as error:
        raise GraphError(f"Ray ended the run: {one_sentence(error)}") from error
    if report:
        raise (InputError if report["is_input"] else GraphError)(report["fatal"])


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
        report = _reported(work, self._job)
        return {"fatal": [report.get("fatal", "")], "is_input": [bool(report.get("is_input", False))]}


def _reported(work: Callable[[Job], None], job: Job) -> dict[str, Any]:
    """Calls `work`; returns the report of its error, or an empty one."""
    try:
        work(job)
    except StorageError as error:
        return _storage_failure(error)
    except Exception as error:
        return _unexpected(error, job, work.__name__)
    return {}


def raise_fatal(report: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Raises the error of a report that ends the whole run, if it holds one; names the run if there are several."""
    if report["fatal"]:
        kind = InputError if report["is_input"] else GraphError
        run = f"{jobs[int(report['job'])].config.name}: " if len(jobs) > 1 else ""
        raise kind(f"{run}{report['fatal']}")


def _rows(reports: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from reports.iter_rows()
    except ray.exceptions.RayError as error:
        raise GraphError(f"Ray ended the run: {one_sentence(error)}") from error


class _Stage(ABC):
    """A stage of the graph: holds one worker for each run, made when the run's first group arrives.

    An error while making the worker is reported with the group. If the constructor of a Ray actor raised it, the user
    would see a page of traceback after several retries.
    """

    KIND: str

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._shared: tuple[Any, ...] = ()
        self._workers: dict[int, Any] = {}
        self._fatal: dict[str, Any] = {}
        self._clock = Clock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not self._jobs[int(batch["job"][0])].profile:
            return self._work(batch) | {"seconds": ["{}"]}
        with self._clock.call() as account, stage(OTHER):
            result = self._work(batch)
        before = json.loads(batch["seconds"][0]) if "seconds" in batch else {}
        return result | {"seconds": [json.dumps(before | {self.KIND: account.seconds})]}

    @abstractmethod
    def _worker_class(self, job: Job) -> type:
        """Class of the job's worker."""

    @abstractmethod
    def _work(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Processes one group; returns the columns for the next stage."""

    def _worker(self, index: int) -> Any:
        """The run's worker, or a report of the error if it cannot be made."""
        if index not in self._workers:
            # Groups arrive run by run, except for a few late ones, so the previous run's worker is kept. A worker with
            # another model is dropped first, since two models may not fit into memory.
            same = [other for other in self._workers if _model(self._jobs[other]) == _model(self._jobs[index])]
            self._workers = {other: self._workers[other] for other in same[-1:]}
            with stage(LOADING):
                self._workers[index] = self._make(index)
        return self._workers[index]

    def _make(self, index: int) -> Any:
        job = self._jobs[index]
        worker = self._worker_class(job)
        try:
            return worker(job, *self._shared)
        except Exception as error:
            return _unexpected(error, job, worker.__name__)


def worker_class(job: Job) -> type[GroupWorker]:
    """Class of the worker that makes a job's rows."""
    return EditActor if job.scored is None else ScoreActor


def _model(job: Job) -> tuple[object, ...]:
    """The settings that decide which model a worker loads."""
    scored = () if job.scored is None else (job.scored.checkpoint, job.scored.committed)
    return job.config.backbone, job.config.pipeline.feature_store, scored


class PrepareStage(_Stage):
    """`{"job", "group"}` -> `{"job", "prepared"}`; pickled, since a request is not a table."""

    KIND = PREPARE

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(jobs)
        # A single run prepares every record once and needs no cache.
        self._shared = (RequestCache(),) if len(jobs) > 1 else ()

    def _worker_class(self, job: Job) -> type:
        return Preparer

    def _work(self, batch: dict[str, Any]) -> dict[str, Any]:
        index, group = int(batch["job"][0]), int(batch["group"][0])
        worker = self._worker(index)
        with stage("records and pictures"):
            prepared = worker if isinstance(worker, dict) else self._prepared(worker, index, group)
        return {"job": [index], "prepared": [cloudpickle.dumps(prepared, protocol=5)]}

    def _prepared(self, worker: Any, index: int, group: int) -> Any:
        try:
            return worker(group)
        except StorageError as error:
            return _storage_failure(error)
        except Exception as error:
            return _unexpected(error, self._jobs[index], f"group-{group:06d}")


class EditStage(_Stage):
    """`{"job", "prepared"}` -> one report per group."""

    KIND = EDIT

    def _worker_class(self, job: Job) -> type:
        return worker_class(job)

    def _work(self, batch: dict[str, Any]) -> dict[str, Any]:
        index, prepared = int(batch["job"][0]), cloudpickle.loads(batch["prepared"][0])
        # After a fatal error the block's other groups are not edited; the driver sees the error only after the block.
        worker: Any = self._fatal or self._worker(index)
        fatal = next((report for report in (worker, prepared) if isinstance(report, dict)), {})
        rows: list[Row] = []
        try:
            rows = [] if fatal else worker(prepared)
        except StorageError as error:
            fatal = _storage_failure(error)
        except OSError as error:
            message = f"results cannot be written ({one_sentence(error)}). The same command goes on from there."
            fatal = {"fatal": message, "is_input": False}
        except Exception as error:
            fatal = _unexpected(error, self._jobs[index], f"group-{prepared.group:06d}")
        self._fatal = fatal
        return {
            "job": [index],
            "group": [-1 if fatal else prepared.group],
            "rows": [json.dumps(rows)],
            "fatal": [fatal.get("fatal", "")],
            "is_input": [bool(fatal.get("is_input", False))],
        }


def _unexpected(error: Exception, job: Job, name: str) -> dict[str, Any]:
    """The report of an exception that ends the run. Raised through Ray, it would become a page of traceback."""
    if isinstance(error, InputError):
        return {"fatal": str(error), "is_input": True}
    write_traceback(job, name)
    return {"fatal": f"{one_sentence(error)} (traceback: {job.workspace.errors}/{name}.txt)", "is_input": False}


def _storage_failure(error: StorageError) -> dict[str, Any]:
    """The report of storage that cannot be read, which ends the run."""
    return {"fatal": f"{error} The same command goes on from there.", "is_input": False}


def _quiet() -> None:
    """Turns off the progress bars and messages of Ray Data."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
