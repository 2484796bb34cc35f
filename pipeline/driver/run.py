"""A run from configuration to summary: stages records, edits pending groups, writes summary and report, logs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from rich.console import Console

from odedit.errors import InputError, counted
from odedit.runtime.garbage import collect_as_usual
from odedit.storage.location import delete_all
from pipeline.config.run import RunConfig
from pipeline.console import say
from pipeline.driver import tracked
from pipeline.driver.preflight import Ready, prepare, update
from pipeline.driver.progress import Progress
from pipeline.interrupts import interrupts_delayed, raise_if_interrupted, terminate_as_interrupt
from pipeline.run_folder import repair, staging
from pipeline.run_folder.committed import write_edits
from pipeline.run_folder.lock import alone
from pipeline.run_folder.rows import KEPT, PROGRESS_COLUMNS, digest, parts, read_rows, unify
from pipeline.run_folder.summary import summarize_kept, summarize_results
from pipeline.run_folder.workspace import Workspace, read_json, write_json
from pipeline.tracking import models
from pipeline.tracking.client import status_after
from pipeline.tracking.connection import store_uri
from pipeline.tracking.logged import is_logged, run_id_in_store
from pipeline.tracking.runs import EditRun
from pipeline.workers import kept, ray_session
from pipeline.workers.plan import Job, Plan, ScoredModel
from pipeline.workers.profile import Profile


@dataclass(frozen=True)
class Outcome:
    """Results of a finished run.

    Attributes:
        workspace: Folder of the run.
        summary: Content of `summary.json`.
        tracking_uri: MLflow store; None without tracking.
        run_id: Id of the MLflow run; None without tracking.
    """

    workspace: Workspace
    summary: Mapping[str, Any]
    tracking_uri: str | None
    run_id: str | None


def run(config: RunConfig, console: Console, *, fresh: bool = False, profile: Profile | None = None) -> Outcome:
    """Runs or resumes a run; `out` may hold an earlier part of it.

    Args:
        console: Console for progress, on standard error.
        fresh: Whether to delete an earlier run in `out` first, after the input and the settings are checked.
        profile: Profile that the times of this part of the run are added to; stored as `profile.json`.

    Raises:
        InputError: The input or the settings are wrong, or `out` holds another run, or another process writes to it.
        GraphError: The workers could not continue.
        TrackingError: The results are complete, but MLflow could not be written to.
    """
    with alone(config.out, "out"):
        ready = prepare(config, fresh=fresh)
        announce(ready, console)
        try:
            return _run_ready([ready], console, parent_run=None, profile=profile)[0]
        finally:
            if profile is not None and profile.records:
                with suppress(OSError):  # a full disk must not hide how the run ended
                    write_json(ready.workspace.profile, profile.to_json())


def score_into(
    ready: Ready,
    console: Console,
    scored: ScoredModel,
    *,
    profile: Profile | None = None,
    parent_run: str | None = None,
) -> Outcome:
    """Scores or goes on scoring the records of a prepared run on one model, as rows of `odedit edit`.

    The caller holds the lock of the run's folder (`alone`).

    Args:
        ready: Result of `prepare`.
        console: Console for progress.
        scored: The model, what its records edit, and how they were learned.
        profile: Profile that the times of this part of the run are added to.
        parent_run: Id of the MLflow run that the run is nested in.

    Raises:
        Errors of `run`.
    """
    return _run_ready([replace(ready, scored=scored)], console, parent_run, profile)[0]


def run_many(
    configs: Sequence[RunConfig], console: Console, *, fresh: bool = False, parent_run: str | None = None
) -> list[Outcome]:
    """Runs or resumes several runs, one after another, with the same workers.

    Args:
        configs: Configurations. The caller has written to the parent of every `out` that is an address.
        console: Console for progress.
        fresh: Whether existing runs are replaced.
        parent_run: Id of the MLflow run that the runs are nested in.

    Raises:
        Errors of `run`, with the name of the run in the message. Finished groups are kept.
    """
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(alone(config.out, "out"))
        ready = [_prepared(config, fresh=fresh) for config in configs]
        done = sum(run.num_done(run.pending) for run in ready)
        total = sum(run.staged.num_usable for run in ready)
        say(console, f"{counted(len(ready), 'run')}: {done} of {counted(total, 'usable record')} done.")
        for note in dict.fromkeys(note for run in ready for note in run.notes):
            say(console, f"Note: {note}")
        return _run_ready(ready, console, parent_run)


def _prepared(config: RunConfig, *, fresh: bool) -> Ready:
    """As `prepare`, with the name of the run in the message of an error."""
    try:
        return prepare(config, fresh=fresh, is_storage_tried=True)
    except InputError as error:
        raise InputError(f"{config.name}: {error}") from error


def _run_ready(
    ready: Sequence[Ready], console: Console, parent_run: str | None, profile: Profile | None = None
) -> list[Outcome]:
    pending = [(index, group) for index, run in enumerate(ready) for group in run.pending]
    unmeasured = [run for run in ready if run.scored is not None and not kept.is_measured(run.workspace, run.scored)]
    waiting = [*(ready[index] for index, _ in pending), *unmeasured]
    if waiting:
        ray_session.check_reachable(waiting[0].config.pipeline)
    with terminate_as_interrupt(), ExitStack() as stack:
        for run in ready:
            stack.enter_context(_forgetting_attempts(run.workspace))
        runs = [stack.enter_context(_OpenRun(run, parent_run)) for run in ready]
        if len(runs) == 1:
            runs[0].start()  # before the first result, so that MLflow shows the run while it works
        if waiting:
            first = waiting[0].config
            plan = stack.enter_context(ray_session.connected(first.pipeline, first.backbone, len(waiting), console))
            # Again, since Ray has installed a signal handler that exits the process at once.
            stack.enter_context(terminate_as_interrupt())
            if pending:
                _edit(runs, pending, plan, console, profile)
            for run in unmeasured:
                _measure_kept(run, plan, console)
        return [run.finish(console) for run in runs]


@contextmanager
def _forgetting_attempts(workspace: Workspace) -> Iterator[None]:
    """Deletes the counts of attempts if the user interrupts the block: no edit is the cause of these workers' ends.

    Enter it before Ray starts, so that the counts are deleted after the workers have ended.
    """
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):  # an outage of the storage must not delay the end
            delete_all(workspace.attempts.with_patience(0).glob("group-*.json"))
        raise


def announce(ready: Ready, console: Console) -> None:
    """Prints whether the run is new, resumed or finished."""
    pending, total = ready.pending, ready.staged.num_usable
    done = ready.num_done(pending)
    usable = counted(total, "usable record")
    skipped = f", {ready.staged.problems} skipped" if ready.staged.problems else ""
    if not pending:
        text = f"{ready.workspace.out} is finished ({usable}{skipped}). Add --fresh to start over."
    elif len(pending) < len(ready.staged.usable):
        text = f"Resuming {ready.workspace.out}: {done} of {usable} done{skipped}."
    elif ready.workspace.committed.exists() or ready.workspace.training.exists():
        text = f"Resuming {ready.workspace.out}: the model is made or begun, none of {usable} scored{skipped}."
    else:
        text = f"New run in {ready.workspace.out}: {usable}{skipped}."
    say(console, text)
    _say_notes(ready, console)
    before = read_json(ready.workspace.run) or {}
    if pending and done and before.get("code") != ready.code:
        say(console, f"Note: the edits there were made by code version {before.get('code')}, this is {ready.code}.")


def _say_notes(ready: Ready, console: Console) -> None:
    for note in ready.notes:
        say(console, f"Note: {note}")


class _OpenRun:
    """A run in progress, with its MLflow run and its outcome.

    Attributes:
        ready: The checked run.
        seconds: Seconds of editing that are not stored in run.json yet.
    """

    def __init__(self, ready: Ready, parent_run: str | None) -> None:
        self.ready = ready
        self._parent_run = parent_run
        self.seconds = 0.0
        self._tracker: EditRun | None = None
        self._is_started = False
        self._outcome: Outcome | None = None

    def __enter__(self) -> _OpenRun:
        update(self.ready.workspace, ended=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk must not hide the error itself
            self._store_time()
            update(self.ready.workspace, ended=True)
        if self._tracker is not None and self._outcome is None:
            self._tracker.finish(status_after(error), error)

    def start(self) -> None:
        """Creates or resumes the MLflow run; later calls do nothing."""
        if self._is_started:
            return
        self._is_started = True
        ready = self.ready
        if not ready.config.tracking.enabled:
            return
        if not ready.pending and is_logged(ready.config, ready.workspace):
            return
        dataset = {
            "path": ready.sources.path,
            "digest": digest(ready.workspace.records),
            "usable": ready.staged.num_usable,
            "problems": ready.staged.problems,
        }
        with interrupts_delayed():  # a run whose id is not stored would stay RUNNING, beside that of the next command
            self._tracker = EditRun.start(
                ready.config, ready.workspace, run_id_in_store(ready.config, ready.workspace), ready.code, dataset,
                self._parent_run,
                tracked.command(ready.config, is_scored=ready.scored is not None),
            )  # fmt: skip
            update(ready.workspace, run_id=self._tracker.run_id)
        if ready.scored is not None:
            self._tracker.set_tags({f"odedit.{name}": value for name, value in ready.scored.columns.items()})

    def _store_time(self) -> None:
        """Adds `seconds` to the time in run.json."""
        if self.seconds:
            before = (read_json(self.ready.workspace.run) or {}).get("seconds", 0.0)
            update(self.ready.workspace, seconds=before + self.seconds)
            self.seconds = 0.0

    def finish(self, console: Console | None) -> Outcome:
        """Summarises, reports and logs a run whose groups all have a result; later calls return the same outcome."""
        if self._outcome is None:
            self.start()
            self._store_time()
            self._outcome = _finish(self.ready, self._tracker, console)
            if self._tracker is not None:
                self._tracker.finish_with(self._outcome.summary)
        return self._outcome


def job_of(ready: Ready, plan: Plan, *, is_profiled: bool = False) -> Job:
    """Inputs of the workers of a prepared run."""
    return Job(
        ready.config,
        ready.sources,
        ready.workspace,
        plan.device,
        plan.threads_per_actor,
        plan.memory_share,
        is_profiled,
        ready.scored,
    )


def _measure_kept(ready: Ready, plan: Plan, console: Console) -> None:
    """Asks the pool's own questions, and measures the text."""
    from pipeline.workers import engine

    say(console, "Asking the pool's own questions ...")
    engine.run_task(kept.measure, job_of(ready, plan), plan)


def _edit(
    runs: Sequence[_OpenRun],
    pending: Sequence[tuple[int, int]],
    plan: Plan,
    console: Console,
    profile: Profile | None,
) -> None:
    """Edits the pending groups. One of several runs is finished right after its last group."""
    from pipeline.workers import engine

    collect_as_usual()
    say(console, f"Plan: {plan}.")
    ready = [run.ready for run in runs]
    jobs = [job_of(run, plan, is_profiled=profile is not None) for run in ready]
    num_left = Counter(index for index, _ in pending)
    total = sum(run.staged.num_usable + run.staged.problems for run in ready)
    finished = [part for run in ready for part in parts(run.workspace)]
    waits_for = "loading the model" if plan.in_process else "starting workers"
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console, total, str(plan), waits_for))
        progress.include(read_rows(finished, PROGRESS_COLUMNS))
        last = time.monotonic()
        reports = stack.enter_context(closing(engine.run_groups(jobs, plan, pending, profile)))
        for index, _, rows in reports:
            raise_if_interrupted()
            runs[index].start()
            now = time.monotonic()
            runs[index].seconds, last = runs[index].seconds + now - last, now
            progress.observe(rows)
            num_left[index] -= 1
            if not num_left[index] and len(runs) > 1:
                # Overlaps with the workers' edits of the next run.
                runs[index].finish(None)


def _of_model(ready: Ready) -> dict[str, Any]:
    """Entries of the summary of a scored model."""
    if ready.scored is None:
        return {}
    entries = dict(ready.scored.columns) | summarize_kept(ready.workspace)
    if not entries.keys().isdisjoint(KEPT):
        entries["kept_of"] = staging.pool_source(ready.workspace, ready.sources)
    return entries


def _finish(ready: Ready, tracker: EditRun | None, console: Console | None) -> Outcome:
    """Writes summary and report, and logs the run."""
    from pipeline.report.model_card import write_model_card
    from pipeline.report.run_page import write_run_report

    workspace, config = ready.workspace, ready.config
    pending = ready.pending
    if pending:
        raise RuntimeError(f"{counted(len(pending), 'group')} of edits without a result; run the same command again.")
    repair.remove_temporaries(workspace)
    unify(workspace)
    state = read_json(workspace.run)
    summary = (
        summarize_results(workspace, config)
        | _of_model(ready)
        | {
            "wall_seconds": state["seconds"],
            "code": state["code"],
            "software": state["software"],
        }
    )
    write_json(workspace.summary, summary)
    write_run_report(workspace, summary, ready.sources.reader)
    if models.is_committed(workspace):
        write_edits(workspace)
        write_model_card(workspace, config, summary)
    if tracker is not None:
        if console is not None:
            console.print("Logging to MLflow ...", highlight=False)
        tracked.log(tracker, config, workspace, summary, ready.sources.reader)
    if not config.tracking.enabled:
        return Outcome(workspace, summary, None, (read_json(workspace.run) or {}).get("run_id"))
    uri = store_uri(config.tracking, workspace.out)
    return Outcome(workspace, summary, uri, run_id_in_store(config, workspace))
