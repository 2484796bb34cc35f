"""One run from its configuration to its summary: stage, edit what is not edited yet, summarise, track, report."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rich.console import Console

from odedit.backbones import load_processor
from odedit.errors import InputError
from pipeline import local_ray, results, sources, staging, tracking
from pipeline.config import RunConfig
from pipeline.progress import Progress
from pipeline.sources import Sources
from pipeline.spec import Job, Plan
from pipeline.staging import Staged
from pipeline.version import code_version, software
from pipeline.workspace import Workspace, read_json, write_json, write_text

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
        fresh: Delete what `out` holds of an earlier run first.

    Raises:
        InputError: The input or the settings are wrong, or `out` holds another run.
        GraphError: The workers could not go on.
        TrackingError: The results are there, but MLflow could not be written to.
    """
    ready = prepare(config, console, fresh=fresh)
    with terminate_as_interrupt(), ExitStack() as stack:
        tracker = _start_tracking(ready)
        if tracker is not None:
            stack.enter_context(_closing(tracker))
        if ready.pending:
            plan = stack.enter_context(local_ray.connected(config.pipeline, config.backbone, len(ready.pending)))
            # Again, because Ray puts a handler of its own in place, which ends the process at once.
            stack.enter_context(terminate_as_interrupt())
            _edit(ready, plan, console)
        return _finish(ready, tracker, console)


def prepare(config: RunConfig, console: Console, *, fresh: bool = False) -> Ready:
    """Checks what can be checked, stages the input, and finds out what is left to do."""
    workspace = Workspace.of(config.out)
    if fresh:
        _clear(workspace)
    load_processor(config.backbone.family, config.backbone.checkpoint)
    found = sources.resolve(config.data, workspace.out)
    _check_same_run(config, found, workspace)
    workspace.create()
    staged = staging.stage(config, found, workspace)
    if not staged.usable:
        raise InputError(f"data.path: {config.data.path} holds no record.")
    code = code_version()
    ready = Ready(config, workspace, found, staged, code)
    _remember(ready)
    write_text(workspace.config, f"# odedit {code}\n{_public_yaml(config)}")
    _announce(ready, console)
    return ready


def _clear(workspace: Workspace) -> None:
    """Deletes a run's own files, and nothing else that may lie there."""
    for folder in (workspace.results, workspace.edits, workspace.attempts, workspace.out / "errors"):
        shutil.rmtree(folder, ignore_errors=True)
    names = ("records", "pool", "calibration", "run", "config", "summary")
    for path in (*(getattr(workspace, name) for name in names), workspace.out / "report.html"):
        path.unlink(missing_ok=True)


def _public_yaml(config: RunConfig) -> str:
    import yaml

    return yaml.safe_dump(tracking.masked_values(config.to_dict()), sort_keys=False, allow_unicode=True)


def _settings(config: RunConfig) -> dict[str, Any]:
    """What results depend on."""
    flat = tracking.flatten(config.to_dict())
    return {key: value for key, value in flat.items() if key in _COMPARED_ANYWAY or not key.startswith(_NOT_COMPARED)}


def _check_same_run(config: RunConfig, found: Sources, workspace: Workspace) -> None:
    """Raises InputError if `out` holds the results of other settings or other input files."""
    before = read_json(workspace.run)
    if before is None:
        if workspace.records.exists() or any(workspace.results.glob("part-*.parquet")):
            raise InputError(
                f"out: {workspace.out} holds results without run.json. Choose another out, or add --fresh."
            )
        return
    now = _settings(config) | found.identity()
    then = before["settings"]
    changed = [
        f"  {key}: was {then.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]
    if changed:
        lines = "\n".join(changed)
        raise InputError(
            f"out: {workspace.out} holds a run with other settings or input files:\n{lines}\n"
            "Choose another folder (out=...), or add --fresh to delete that run."
        )


def _remember(ready: Ready) -> None:
    before = read_json(ready.workspace.run) or {}
    now = {
        "settings": _settings(ready.config) | ready.sources.identity(),
        "code": before.get("code", ready.code),
        "software": software(),
        "run_id": before.get("run_id"),
        "logged": before.get("logged", False),
        "seconds": before.get("seconds", 0.0),
    }
    write_json(ready.workspace.run, now)


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
    console.print(text, highlight=False, soft_wrap=True)
    before = read_json(ready.workspace.run) or {}
    if ready.pending and done and before.get("code") != ready.code:
        console.print(
            f"Note: the edits there were made by code version {before.get('code')}, this is {ready.code}.",
            highlight=False,
            soft_wrap=True,
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

    console.print(f"Plan: {plan}.", highlight=False, soft_wrap=True)
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
