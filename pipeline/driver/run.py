"""One run from its configuration to its summary: stage, edit what is not edited yet, summarise, track, report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console

from odedit.errors import InputError, counted
from odedit.storage.location import delete_all
from pipeline.config.run import RunConfig
from pipeline.console import say
from pipeline.driver.preflight import Ready, prepare, update
from pipeline.driver.progress import Progress
from pipeline.interrupts import raise_if_interrupted, terminate_as_interrupt
from pipeline.run_folder import repair
from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace, read_json, write_json
from pipeline.tracking.client import store_uri
from pipeline.tracking.runs import EditRun
from pipeline.workers import ray_session
from pipeline.workers.plan import Job, Plan
from pipeline.workers.profile import Profile


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    workspace: Workspace
    summary: Mapping[str, Any]
    tracking_uri: str | None
    run_id: str | None


def run(config: RunConfig, console: Console, *, fresh: bool = False, profile: Profile | None = None) -> Outcome:
    """Runs or resumes; `out` may hold an earlier part of the same run.

    Args:
        console: For progress; standard error.
        fresh: Delete what `out` holds of an earlier run first, once the input and the settings have proved right.
        profile: Takes where the time of this part of the run went; stored as `profile.json`.

    Raises:
        InputError: The input or the settings are wrong, or `out` holds another run.
        GraphError: The workers could not go on.
        TrackingError: The results are there, but MLflow could not be written to.
    """
    ready = prepare(config, fresh=fresh)
    announce(ready, console)
    try:
        return _run_ready([ready], console, parent_run=None, profile=profile)[0]
    finally:
        if profile is not None and profile.records:
            with suppress(OSError):  # a full disk must not hide how the run ended
                write_json(ready.workspace.profile, profile.to_json())


def run_many(
    configs: Sequence[RunConfig], console: Console, *, fresh: bool = False, parent_run: str | None = None
) -> list[Outcome]:
    """Runs or resumes several runs, one after the other, with the same workers.

    Args:
        configs: The runs. Those at an address lie below a folder that the caller has written to.
        fresh: Whether existing runs are replaced.
        parent_run: MLflow run that each run becomes a child of.

    Raises:
        As `run`, with the name of the run; what is finished by then is kept.
    """
    ready = [_prepared(config, fresh=fresh) for config in configs]
    done, total = (sum(one.num_done(one.pending) for one in ready), sum(one.staged.num_usable for one in ready))
    say(console, f"{counted(len(ready), 'run')}: {done} of {counted(total, 'usable record')} done.")
    for one in ready:
        _say_notes(one, console)
    return _run_ready(ready, console, parent_run)


def _prepared(config: RunConfig, *, fresh: bool) -> Ready:
    """As `prepare`, for one of several runs."""
    try:
        return prepare(config, fresh=fresh, is_storage_tried=True)
    except InputError as error:
        raise InputError(f"{config.name}: {error}") from error


def _run_ready(
    ready: Sequence[Ready], console: Console, parent_run: str | None, profile: Profile | None = None
) -> list[Outcome]:
    pending = [(index, group) for index, one in enumerate(ready) for group in one.pending]
    if pending:
        ray_session.check_reachable(ready[pending[0][0]].config.pipeline)
    with terminate_as_interrupt(), ExitStack() as stack:
        for one in ready:
            stack.enter_context(_forgiving(one.workspace))
        runs = [stack.enter_context(_OpenRun(one, parent_run)) for one in ready]
        if len(runs) == 1:
            runs[0].start()  # before the first result, to be seen in MLflow while it works
        if pending:
            first = ready[pending[0][0]].config
            plan = stack.enter_context(ray_session.connected(first.pipeline, first.backbone, len(pending), console))
            # Again, because Ray puts a handler of its own in place, which ends the process at once.
            stack.enter_context(terminate_as_interrupt())
            _edit(runs, pending, plan, console, profile)
        return [one.finish(console) for one in runs]


@contextmanager
def _forgiving(workspace: Workspace) -> Iterator[None]:
    """Around Ray's lifetime: a worker that was ended because the user ended the run counts as no attempt."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):  # storage that is out must not hold up the end
            delete_all(workspace.attempts.with_patience(0).glob("group-*.json"))
        raise


def announce(ready: Ready, console: Console) -> None:
    """Says whether the run is new, goes on, or is finished."""
    pending, total = ready.pending, ready.staged.num_usable
    done = ready.num_done(pending)
    usable = counted(total, "usable record")
    skipped = f", {ready.staged.problems} skipped" if ready.staged.problems else ""
    if not pending:
        text = f"{ready.workspace.out} is finished ({usable}{skipped}). Add --fresh to start over."
    elif len(pending) < len(ready.staged.usable):
        text = f"Resuming {ready.workspace.out}: {done} of {usable} done{skipped}."
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
    """A run while it works: its MLflow run, the time its edits take, and in the end its outcome."""

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
            self._keep_time()
            update(self.ready.workspace, ended=True)
        if self._tracker is not None and self._outcome is None:
            self._tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def start(self) -> None:
        """Opens the MLflow run, a new one or that of an earlier part."""
        if self._is_started:
            return
        self._is_started = True
        ready = self.ready
        state = read_json(ready.workspace.run)
        is_complete = not ready.pending and state.get("logged")
        if not ready.config.tracking.enabled or is_complete:
            return
        dataset = {
            "path": ready.sources.path,
            "digest": results.digest(ready.workspace.records),
            "usable": ready.staged.num_usable,
            "problems": ready.staged.problems,
        }
        self._tracker = EditRun.start(
            ready.config, ready.workspace, state.get("run_id"), ready.code, dataset, self._parent_run
        )
        update(ready.workspace, run_id=self._tracker.run_id)

    def _keep_time(self) -> None:
        """Adds the time to the run's account, which outlives an interruption."""
        if self.seconds:
            before = (read_json(self.ready.workspace.run) or {}).get("seconds", 0.0)
            update(self.ready.workspace, seconds=before + self.seconds)
            self.seconds = 0.0

    def finish(self, console: Console | None) -> Outcome:
        """Summarises, reports and logs a run whose groups all have a result; the second time it only says so."""
        if self._outcome is None:
            self.start()
            self._keep_time()
            self._outcome = _finish(self.ready, self._tracker, console)
            if self._tracker is not None:
                self._tracker.finish_with(self._outcome.summary)
        return self._outcome


def _edit(
    runs: Sequence[_OpenRun],
    pending: Sequence[tuple[int, int]],
    plan: Plan,
    console: Console,
    profile: Profile | None,
) -> None:
    from pipeline.workers import graph

    say(console, f"Plan: {plan}.")
    ready = [one.ready for one in runs]
    jobs = [
        Job(
            one.config,
            one.sources,
            one.workspace,
            plan.device,
            plan.threads_per_actor,
            plan.memory_share,
            profile is not None,
        )
        for one in ready
    ]
    left = Counter(index for index, _ in pending)
    total = sum(one.staged.num_usable + one.staged.problems for one in ready)
    finished = [part for one in ready for part in results.parts(one.workspace)]
    with Progress(console, total) as progress:
        progress.include(results.read_rows(finished, results.PROGRESS_COLUMNS))
        last = time.monotonic()
        for index, _, rows in graph.run_graph(jobs, plan, pending, profile):
            raise_if_interrupted()
            runs[index].start()
            now = time.monotonic()
            runs[index].seconds, last = runs[index].seconds + now - last, now
            progress.observe(rows)
            left[index] -= 1
            if not left[index] and len(runs) > 1:
                # While the workers go on with the next run.
                runs[index].finish(None)


def _finish(ready: Ready, tracker: EditRun | None, console: Console | None) -> Outcome:
    from pipeline.report import page

    workspace, config = ready.workspace, ready.config
    pending = ready.pending
    if pending:
        raise RuntimeError(f"{counted(len(pending), 'group')} of edits without a result; run the same command again.")
    repair.remove_temporaries(workspace)
    results.unify(workspace)
    state = read_json(workspace.run)
    summary = results.summarize_results(workspace, config) | {
        "wall_seconds": state["seconds"],
        "code": state["code"],
        "software": state["software"],
    }
    write_json(workspace.summary, summary)
    page.write_run_report(workspace, summary)
    if tracker is not None:
        if console is not None:
            console.print("Logging to MLflow ...", highlight=False)
        tracker.log_results(config, workspace, summary)
        update(workspace, logged=True)
    uri = store_uri(config.tracking, workspace.out) if config.tracking.enabled else None
    return Outcome(workspace, summary, uri, (read_json(workspace.run) or {}).get("run_id"))
