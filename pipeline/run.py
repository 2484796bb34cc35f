"""One run from its configuration to its summary: stage, edit what is not edited yet, summarise, track, report."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from odedit.backbones import fingerprint, load_processor
from odedit.errors import InputError
from odedit.locations import masked
from pipeline import local_ray, results, sources, staging, tracking
from pipeline.config import EMBEDDED, RunConfig
from pipeline.progress import Progress
from pipeline.sources import Sources
from pipeline.spec import Job, Plan
from pipeline.staging import Staged
from pipeline.version import code_version, software
from pipeline.workspace import CONFIG_HEADER, Workspace, read_json, write_json, write_text

_NOT_COMPARED = ("tracking.", "out", "pipeline.")
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
    ready = prepare(config, console, fresh=fresh)
    config = ready.config
    with terminate_as_interrupt(), _forgiving(ready.workspace), ExitStack() as stack:
        tracker = _start_tracking(ready)
        if tracker is not None:
            stack.enter_context(_closing(tracker))
        if ready.pending:
            plan = stack.enter_context(local_ray.connected(config.pipeline, config.backbone, len(ready.pending)))
            # Again, because Ray puts a handler of its own in place, which ends the process at once.
            stack.enter_context(terminate_as_interrupt())
            _edit(ready, plan, console)
        return _finish(ready, tracker, console)


@contextmanager
def _forgiving(workspace: Workspace) -> Iterator[None]:
    """Around Ray's lifetime: a worker that was ended because the user ended the run counts as no attempt."""
    try:
        yield
    except KeyboardInterrupt:
        for path in workspace.attempts.glob("group-*.json"):
            path.unlink(missing_ok=True)
        raise


def prepare(config: RunConfig, console: Console, *, fresh: bool = False) -> Ready:
    """Checks what can be checked, stages the input, and finds out what is left to do."""
    workspace = Workspace.of(config.out)
    load_processor(config.backbone.family, config.backbone.checkpoint)
    config = _with_absolute_checkpoint(config)
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
    _announce(ready, console)
    return ready


def _with_absolute_checkpoint(config: RunConfig) -> RunConfig:
    """A local checkpoint's full path: workers run in another directory, and so may `odedit apply`."""
    path = Path(config.backbone.checkpoint).expanduser()
    if config.backbone.checkpoint == EMBEDDED or not path.is_dir():
        return config
    return replace(config, backbone=replace(config.backbone, checkpoint=str(path.absolute())))


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


def _announce(ready: Ready, console: Console) -> None:
    total, done = ready.staged.num_usable, ready.num_done()
    skipped = f", {ready.staged.problems} records skipped" if ready.staged.problems else ""
    if not ready.pending:
        text = f"{ready.workspace.out} is finished ({total} edits{skipped}); nothing to do. Add --fresh to start over."
    elif ready.pending and len(ready.pending) < len(ready.staged.usable):
        text = f"Resuming {ready.workspace.out}: {done} of {total} edits done{skipped}."
    else:
        text = f"New run in {ready.workspace.out}: {total} edits{skipped}."
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    before = read_json(ready.workspace.run) or {}
    if ready.pending and done and before.get("code") != ready.code:
        console.print(
            f"Note: the edits there were made by code version {before.get('code')}, this is {ready.code}.",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


def _start_tracking(ready: Ready) -> tracking.Tracker | None:
    state = read_json(ready.workspace.run)
    is_complete = not ready.pending and state.get("logged")
    if not ready.config.tracking.enabled or is_complete:
        return None
    dataset = {
        "path": ready.sources.path,
        "digest": results.digest(ready.workspace.records),
        "usable": ready.staged.num_usable,
        "problems": ready.staged.problems,
    }
    tracker = tracking.Tracker.start(ready.config, ready.workspace, state.get("run_id"), ready.code, dataset)
    _update(ready.workspace, run_id=tracker.run_id)
    return tracker


@contextmanager
def _closing(tracker: tracking.Tracker) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def _edit(ready: Ready, plan: Plan, console: Console) -> None:
    from pipeline import graph

    console.print(f"Plan: {plan}.", highlight=False, soft_wrap=True, markup=False)
    job = Job(ready.config, ready.sources, ready.workspace, plan.device, plan.threads_per_actor)
    started = time.monotonic()
    finished = results.parts(ready.workspace)
    try:
        with Progress(console, ready.staged.num_usable, ready.num_done()) as progress:
            progress.include(results.read_rows(finished, results.PROGRESS_COLUMNS))
            for group, rows in graph.run_graph(job, plan, ready.pending):
                progress.observe(rows, ready.staged.usable[group])
    finally:
        before = (read_json(ready.workspace.run) or {}).get("seconds", 0.0)
        _update(ready.workspace, seconds=before + time.monotonic() - started)


def _finish(ready: Ready, tracker: tracking.Tracker | None, console: Console) -> Outcome:
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
