"""The two stages of the work on a group: prepare (CPU), and edit or score. A failure that ends the run is a value.

Ray's actors run them (`pipeline.workers.graph`), or the command's own process (`pipeline.workers.in_process`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from odedit.errors import Explained, InputError, StorageError, one_sentence
from odedit.runtime.stages import stage
from pipeline.run_folder.rows import Row
from pipeline.workers.editor import EditActor
from pipeline.workers.group import GroupWorker
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Prepared, Preparer, write_traceback
from pipeline.workers.profile import EDIT, LOADING, OTHER, PREPARE, Clock
from pipeline.workers.request_cache import RequestCache
from pipeline.workers.scoring import ScoreActor


class GraphError(Explained, RuntimeError):
    """The run cannot continue; the message is one sentence."""


@dataclass(frozen=True)
class Fatal:
    """A failure that ends the whole run. Raised through Ray, its exception would become a page of traceback.

    Attributes:
        message: The message, one sentence.
        is_input: Whether the input or the settings are wrong.
    """

    message: str
    is_input: bool = False

    def error(self, prefix: str = "") -> Exception:
        """The exception for the user."""
        return (InputError if self.is_input else GraphError)(prefix + self.message)


def fatal_of(error: Exception, job: Job, name: str) -> Fatal:
    """The failure of an exception; the traceback of an unexpected one is written to the file of that name."""
    if isinstance(error, StorageError):
        return Fatal(f"{error} The same command goes on from there.")
    if isinstance(error, InputError):
        return Fatal(str(error), is_input=True)
    write_traceback(job, name)
    return Fatal(f"{one_sentence(error)} (traceback: {job.workspace.errors}/{name}.txt)")


def attempted(work: Callable[[Job], None], job: Job) -> Fatal | None:
    """Calls `work`; returns its failure, or None."""
    try:
        work(job)
    except Exception as error:
        return fatal_of(error, job, work.__name__)
    return None


def prefix_of(jobs: Sequence[Job], index: int) -> str:
    """Beginning of the message about a job: the name of its run if there are several."""
    return f"{jobs[index].config.name}: " if len(jobs) > 1 else ""


class Stage(ABC):
    """A stage: holds one worker for each run, made when the run's first group arrives.

    An error while making the worker is reported with the group. If the constructor of a Ray actor raised it, the user
    would see a page of traceback after several retries.
    """

    KIND: str

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._shared: tuple[Any, ...] = ()
        self._workers: dict[int, Any] = {}
        self._clock = Clock()

    @contextmanager
    def timed(self, index: int) -> Iterator[dict[str, dict[str, float]]]:
        """Inside, stages of a profiled job are timed; the value holds the seconds by kind and stage after the block."""
        seconds: dict[str, dict[str, float]] = {}
        if not self._jobs[index].profile:
            yield seconds
            return
        with self._clock.call() as account, stage(OTHER):
            yield seconds
        seconds[self.KIND] = account.seconds

    @abstractmethod
    def _worker_class(self, job: Job) -> type:
        """Class of the job's worker."""

    def _worker(self, index: int) -> Any:
        """The run's worker, or the failure if it cannot be made."""
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
            return fatal_of(error, job, worker.__name__)


class Preparing(Stage):
    """The stage that reads the records and pictures of a group."""

    KIND = PREPARE

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(jobs)
        # A single run prepares every record once and needs no cache.
        self._shared = (RequestCache(),) if len(jobs) > 1 else ()

    def _worker_class(self, job: Job) -> type:
        return Preparer

    def prepared(self, index: int, group: int) -> Prepared | Fatal:
        """The prepared group of the job of that index."""
        worker = self._worker(index)
        if isinstance(worker, Fatal):
            return worker
        with stage("records and pictures"):
            try:
                prepared: Prepared = worker(group)
            except Exception as error:
                return fatal_of(error, self._jobs[index], f"group-{group:06d}")
        return prepared


class Editing(Stage):
    """The stage that edits or scores a group, and writes its rows."""

    KIND = EDIT

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(jobs)
        self._fatal: Fatal | None = None

    def _worker_class(self, job: Job) -> type:
        return worker_class(job)

    def edited(self, index: int, prepared: Prepared | Fatal) -> list[Row] | Fatal:
        """The reported columns of the group's rows.

        After a failure the next group is not edited: of a block of groups, the driver sees the failure at the end.
        """
        worker = self._fatal or self._worker(index)
        result: list[Row] | Fatal
        if isinstance(worker, Fatal):
            result = worker
        else:
            result = prepared if isinstance(prepared, Fatal) else self._rows(worker, index, prepared)
        self._fatal = result if isinstance(result, Fatal) else None
        return result

    def _rows(self, worker: Any, index: int, prepared: Prepared) -> list[Row] | Fatal:
        try:
            rows: list[Row] = worker(prepared)
        except OSError as error:
            return Fatal(f"results cannot be written ({one_sentence(error)}). The same command goes on from there.")
        except Exception as error:
            return fatal_of(error, self._jobs[index], f"group-{prepared.group:06d}")
        return rows


def worker_class(job: Job) -> type[GroupWorker]:
    """Class of the worker that makes a job's rows."""
    return EditActor if job.scored is None else ScoreActor


def _model(job: Job) -> tuple[object, ...]:
    """The settings that decide which model a worker loads."""
    scored = () if job.scored is None else (job.scored.checkpoint, job.scored.committed)
    return job.config.backbone, job.config.pipeline.feature_store, scored
