"""One run from its configuration to its summary: stage, edit what is not edited yet, summarise, track, report."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from odedit.backbones import fingerprint, load_processor
from odedit.errors import InputError
from odedit.locations import masked
from pipeline import local_ray, results, sources, staging, tracking
from pipeline.checkpoints import editor_weights, with_absolute_checkpoints
from pipeline.config import RunConfig
from pipeline.progress import Progress
from pipeline.sources import Sources
from pipeline.spec import Job, Plan
from pipeline.staging import Staged
from pipeline.version import code_version, software
from pipeline.workspace import CONFIG_HEADER, Workspace, read_json, write_json, write_text

_NOT_COMPARED = ("tracking.", "training.", "out", "pipeline.")
_COMPARED_ANYWAY = ("pipeline.batch_size",)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    workspace: Workspace
    summary: Mapping[str, Any]
    tracking_uri: str | None
    run_id: str | None


@dataclass(frozen=True)
class Ready:
    """A run that has passed every check that needs no worker."""

    config: RunConfig
    workspace: Workspace
    sources: Sources
    staged: Staged
    code: str

    @property
    def pending(self) -> list[int]:
        done = results.finished_groups(self.workspace)
        return [group for group in range(len(self.staged.usable)) if group not in done]

    def num_done(self) -> int:
        pending = set(self.pending)
        return sum(count for group, count in enumerate(self.staged.usable) if group not in pending)


def run(config: RunConfig, console: Console, *, fresh: bool = False) -> Outcome:
    """Runs or resumes; `out` may hold an earlier part of the same run.

    Args:
        console: For progress; standard error.
        fresh: Delete what `out` holds of an earlier run first, once the input and the settings have proved right.

    Raises:
        InputError: The input or the settings are wrong, or `out` holds another run.
        GraphError: The workers could not go on.
        TrackingError: The results are there, but MLflow could not be written to.
    """
    ready = prepare(config, fresh=fresh)
    announce(ready, console)
    return _run_ready([ready], console, parent_run=None)[0]


def run_many(
    configs: Sequence[RunConfig], console: Console, *, fresh: bool = False, parent_run: str | None = None
) -> list[Outcome]:
    """Runs or resumes several runs, one after the other, with the same workers.

    Args:
        fresh: As for `run`.
        parent_run: MLflow run that each run becomes a child of.

    Raises:
        As `run`, with the name of the run; what is finished by then is kept.
    """
    ready = [_prepared(config, fresh=fresh) for config in configs]
    done, total = (sum(one.num_done() for one in ready), sum(one.staged.num_usable for one in ready))
    console.print(f"{len(ready)} runs: {done} of {total} usable records done.", highlight=False)
    return _run_ready(ready, console, parent_run)


def _prepared(config: RunConfig, *, fresh: bool) -> Ready:
    """As `prepare`, for one of several runs."""
    try:
        return prepare(config, fresh=fresh)
    except InputError as error:
        raise InputError(f"{config.name}: {error}") from error


def _run_ready(ready: Sequence[Ready], console: Console, parent_run: str | None) -> list[Outcome]:
    pending = [(index, group) for index, one in enumerate(ready) for group in one.pending]
    with terminate_as_interrupt(), ExitStack() as stack:
        for one in ready:
            stack.enter_context(_forgiving(one.workspace))
        runs = [stack.enter_context(_OpenRun(one, parent_run)) for one in ready]
        if len(runs) == 1:
            runs[0].start()  # before the first result, to be seen in MLflow while it works
        if pending:
            first = ready[pending[0][0]].config
            plan = stack.enter_context(local_ray.connected(first.pipeline, first.backbone, len(pending)))
            # Again, because Ray puts a handler of its own in place, which ends the process at once.
            stack.enter_context(terminate_as_interrupt())
            _edit(runs, pending, plan, console)
        return [one.finish(console) for one in runs]


@contextmanager
def _forgiving(workspace: Workspace) -> Iterator[None]:
    """Around Ray's lifetime: a worker that was ended because the user ended the run counts as no attempt."""
    try:
        yield
    except KeyboardInterrupt:
        for path in workspace.attempts.glob("group-*.json"):
            path.unlink(missing_ok=True)
        raise


def prepare(config: RunConfig, *, fresh: bool = False) -> Ready:
    """Checks what can be checked, stages the input, and finds out what is left to do."""
    workspace = Workspace.of(config.out)
    load_processor(config.backbone.family, config.backbone.checkpoint)
    config = with_absolute_checkpoints(config)
    found = sources.resolve(config.data, workspace.out)
    found.reader.check_roots()
    settings = _settings(config, found)
    _check_config_is_ours(workspace)
    # Only now: a mistake in the settings must not cost the results of an earlier run.
    before = _own_run(workspace)
    if before is None:
        _make_room(workspace, fresh=fresh)
    elif not fresh:
        _check_same_run(settings, before["settings"], workspace)
    else:
        with staging.aside(config, found, workspace):
            _clear(workspace)
    workspace.create()
    staged = staging.stage(config, found, workspace)
    code = code_version()
    ready = Ready(config, workspace, found, staged, code)
    _remember(workspace, settings, code)
    write_text(workspace.config, f"{CONFIG_HEADER} {code}\n{_public_yaml(config)}")
    return ready


def _check_config_is_ours(workspace: Workspace) -> None:
    """Raises InputError if the run's copy of its configuration would replace a file that the user wrote."""
    try:
        with workspace.config.open(encoding="utf-8", errors="replace") as stream:
            is_ours = stream.read(len(CONFIG_HEADER)) == CONFIG_HEADER
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"out: {workspace.config} cannot be read: {error.strerror}.") from error
    if not is_ours:
        raise InputError(
            f"out: {workspace.config} was not written by odedit and would be replaced. Choose another folder (out=...)."
        )


def _own_run(workspace: Workspace) -> dict[str, Any] | None:
    """What the folder's run.json says, or None if there is none. Raises InputError if it is something else's."""
    found = read_json(workspace.run)
    if isinstance(found, dict) and isinstance(found.get("settings"), dict):
        return found
    if workspace.run.exists():
        raise InputError(f"out: {workspace.run} was not written by odedit. Choose another folder (out=...).")
    return None


def _make_room(workspace: Workspace, *, fresh: bool) -> None:
    """Removes what a run that never began left behind; refuses a folder with anything that might be worth keeping."""
    if results.parts(workspace):
        raise InputError(f"out: {workspace.out} holds results without run.json. Choose another folder (out=...).")
    staging.remove_leftovers(workspace)
    stranger = next((path for path in workspace.out.rglob("*") if not path.is_dir()), None) if fresh else None
    if stranger is not None:
        raise InputError(
            f"--fresh: {workspace.out} holds {stranger.name!r}, but no run.json: it is not a run's folder. "
            "Choose another folder (out=...), or leave out --fresh."
        )


def _clear(workspace: Workspace) -> None:
    """Deletes a run's own files, and nothing else that may lie there; run.json last, so that a kill can be repeated."""
    written = {
        workspace.results: ("part-*.parquet", ".part-*.tmp"),
        workspace.edits: ("*.safetensors", ".*.safetensors.*.tmp"),
        workspace.attempts: ("group-*.json", ".group-*.tmp"),
        workspace.errors: ("*.txt",),
    }
    for folder, patterns in written.items():
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or it holds something else
            folder.rmdir()
    for name in ("records", "pool", "calibration", "config", "summary", "report", "run"):
        getattr(workspace, name).unlink(missing_ok=True)


def _public_yaml(config: RunConfig) -> str:
    import yaml

    return yaml.safe_dump(tracking.masked_values(config.to_dict()), sort_keys=False, allow_unicode=True)


def _settings(config: RunConfig, found: Sources) -> dict[str, Any]:
    """What results depend on: settings, input files, and the model's weights; without secrets."""
    flat = tracking.flatten(config.to_dict())
    compared = {
        key: value for key, value in flat.items() if key in _COMPARED_ANYWAY or not key.startswith(_NOT_COMPARED)
    }
    weights = {"backbone.weights": fingerprint(config.backbone.family, config.backbone.checkpoint)}
    weights |= editor_weights(config)
    return {key: _told_apart(value) for key, value in (compared | found.identity() | weights).items()}


def _told_apart(value: Any) -> Any:
    """The value without secrets; a hash beside them still shows that one was changed."""
    if isinstance(value, list):
        return [_told_apart(item) for item in value]
    if not isinstance(value, str) or masked(value) == value:
        return value
    return f"{masked(value)} [{hashlib.sha256(value.encode()).hexdigest()[:8]}]"


def _check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], workspace: Workspace) -> None:
    """Raises InputError if `out` holds the results of other settings or other input files."""
    changed = [
        f"  {key}: was {then.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if changed:
        lines = "\n".join(changed)
        raise InputError(
            f"out: {workspace.out} holds a run with other settings or input files:\n{lines}\n"
            "Choose another folder (out=...), or add --fresh to delete that run."
        )


def _remember(workspace: Workspace, settings: Mapping[str, Any], code: str) -> None:
    before = read_json(workspace.run) or {}
    now = {
        "settings": settings,
        "code": before.get("code", code),
        "software": software(),
        "run_id": before.get("run_id"),
        "logged": before.get("logged", False),
        "seconds": before.get("seconds", 0.0),
    }
    write_json(workspace.run, now)


def _update(workspace: Workspace, **values: Any) -> None:
    write_json(workspace.run, (read_json(workspace.run) or {}) | values)


def announce(ready: Ready, console: Console) -> None:
    """Says whether the run is new, goes on, or is finished."""
    total, done = ready.staged.num_usable, ready.num_done()
    skipped = f", {ready.staged.problems} skipped" if ready.staged.problems else ""
    if not ready.pending:
        text = f"{ready.workspace.out} is finished ({total} usable records{skipped}). Add --fresh to start over."
    elif ready.pending and len(ready.pending) < len(ready.staged.usable):
        text = f"Resuming {ready.workspace.out}: {done} of {total} usable records done{skipped}."
    else:
        text = f"New run in {ready.workspace.out}: {total} usable records{skipped}."
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    before = read_json(ready.workspace.run) or {}
    if ready.pending and done and before.get("code") != ready.code:
        console.print(
            f"Note: the edits there were made by code version {before.get('code')}, this is {ready.code}.",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


class _OpenRun:
    """A run while it works: its MLflow run, its clock, and in the end its outcome."""

    def __init__(self, ready: Ready, parent_run: str | None) -> None:
        self.ready = ready
        self._parent_run = parent_run
        self._tracker: tracking.Tracker | None = None
        self._last: float | None = None
        self._outcome: Outcome | None = None

    def __enter__(self) -> _OpenRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tracker is not None and self._outcome is None:
            self._tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def start(self) -> None:
        """Opens the MLflow run, a new one or that of an earlier part, and starts the clock."""
        if self._last is not None:
            return
        self._last = time.monotonic()
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
        self._tracker = tracking.Tracker.start(
            ready.config, ready.workspace, state.get("run_id"), ready.code, dataset, self._parent_run
        )
        _update(ready.workspace, run_id=self._tracker.run_id)

    def tick(self) -> None:
        """Adds the time since the last call to the run's account, which outlives an interruption."""
        now = time.monotonic()
        assert self._last is not None
        before = (read_json(self.ready.workspace.run) or {}).get("seconds", 0.0)
        _update(self.ready.workspace, seconds=before + now - self._last)
        self._last = now

    def finish(self, console: Console | None) -> Outcome:
        """Summarises, reports and logs a run whose groups all have a result; the second time it only says so."""
        if self._outcome is None:
            self.start()
            self._outcome = _finish(self.ready, self._tracker, console)
            if self._tracker is not None:
                self._tracker.finish("FINISHED")
        return self._outcome


def _edit(runs: Sequence[_OpenRun], pending: Sequence[tuple[int, int]], plan: Plan, console: Console) -> None:
    from pipeline import graph

    console.print(f"Plan: {plan}.", highlight=False, soft_wrap=True, markup=False)
    ready = [one.ready for one in runs]
    jobs = [Job(one.config, one.sources, one.workspace, plan.device, plan.threads_per_actor) for one in ready]
    left = Counter(index for index, _ in pending)
    total = sum(one.staged.num_usable + one.staged.problems for one in ready)
    finished = [part for one in ready for part in results.parts(one.workspace)]
    with Progress(console, total) as progress:
        progress.include(results.read_rows(finished, results.PROGRESS_COLUMNS))
        for index, _, rows in graph.run_graph(jobs, plan, pending):
            runs[index].start()
            runs[index].tick()
            progress.observe(rows)
            left[index] -= 1
            if not left[index] and len(runs) > 1:
                # While the workers go on with the next run.
                runs[index].finish(None)


def _finish(ready: Ready, tracker: tracking.Tracker | None, console: Console | None) -> Outcome:
    from pipeline import report

    workspace, config = ready.workspace, ready.config
    if ready.pending:
        raise RuntimeError(f"{len(ready.pending)} groups of edits have no result; run the same command again.")
    results.unify(workspace)
    state = read_json(workspace.run)
    summary = results.summarize_results(workspace, config) | {
        "wall_seconds": state["seconds"],
        "code": state["code"],
        "software": state["software"],
    }
    write_json(workspace.summary, summary)
    report.write_run_report(workspace, summary)
    if tracker is not None:
        if console is not None:
            console.print("Logging to MLflow ...", highlight=False)
        tracker.log_results(config, workspace, summary)
        _update(workspace, logged=True)
    uri = tracking.store_uri(config.tracking, workspace.out) if config.tracking.enabled else None
    return Outcome(workspace, summary, uri, (read_json(workspace.run) or {}).get("run_id"))


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM ends the run as Ctrl-C does: Ray is stopped, the MLflow run closed, and no result is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
