"""A small run in the command's own process: the stages one after the other, without Ray.

Starting Ray and its workers takes longer than a few groups. A crash of native code then ends the command; the counts
of attempts are on disk, so that the same command goes on and gives the edit up that causes it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from odedit.errors import StorageError, one_sentence
from odedit.runtime.process import configure_process, restored_process
from pipeline.run_folder.rows import Row
from pipeline.run_folder.workspace import Workspace
from pipeline.variables import environment
from pipeline.workers.committing import CommitJob, commit, show_progress
from pipeline.workers.device_errors import DeviceLost, in_own_process
from pipeline.workers.plan import Job
from pipeline.workers.profile import Profile
from pipeline.workers.stages import Editing, Fatal, GraphError, Preparing, attempted, fatal_of, prefix_of

_POLL_S = 0.5
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def run_groups(
    jobs: Sequence[Job], pending: Sequence[tuple[int, int]], profile: Profile | None = None
) -> Generator[tuple[int, int, list[Row]]]:
    """As `pipeline.workers.graph.run_graph`."""
    preparing, editing = Preparing(jobs), Editing(jobs)
    for index, group in pending:
        # Not around the loop: between two groups the process is the caller's.
        with as_worker():
            configure_process(jobs[index].num_threads, jobs[index].device)
            with preparing.timed(index) as prepare_seconds:
                prepared = preparing.prepared(index, group)
            with editing.timed(index) as edit_seconds:
                rows = editing.edited(index, prepared)
        if isinstance(rows, Fatal):
            raise rows.error(prefix_of(jobs, index))
        if profile is not None:
            profile.add({**prepare_seconds, **edit_seconds}, len(rows))
        yield index, group, rows


def run_task(work: Callable[[Job], None], job: Job) -> None:
    """As `pipeline.workers.graph.run_task`."""
    with as_worker():
        fatal = attempted(work, job)
    if fatal is not None:
        raise fatal.error()


def train(commit_job: CommitJob, show: Callable[[Mapping[str, Any]], None]) -> None:
    """As `pipeline.workers.training_group.train`, with one worker."""
    job = commit_job.job
    with _shown(job.workspace, show), as_worker():
        try:
            commit(commit_job)
        except Exception as error:
            raise fatal_of(error, job, "commit-0").error() from error


@contextmanager
def _shown(workspace: Workspace, show: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Inside, the progress that the work writes is shown."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_POLL_S):
            with suppress(OSError, StorageError):  # progress is no result
                show_progress(workspace, show)

    workspace.progress.delete()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def as_worker() -> Iterator[None]:
    """Inside, the process may be set up as a worker, and warnings are not shown; afterwards it is as before.

    Raises:
        GraphError: The GPU was lost.
    """
    try:
        with environment(_QUIET), restored_process(), in_own_process(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DeviceLost as error:
        message = f"the GPU cannot be used any more ({one_sentence(error)}). The same command goes on from there."
        raise GraphError(message) from error
