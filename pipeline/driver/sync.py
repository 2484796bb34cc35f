"""`odedit mlflow sync`: logs a finished run whose logging failed, without editing anything."""

from __future__ import annotations

from dataclasses import replace

from odedit.errors import InputError
from odedit.runtime.addresses import masked
from pipeline.config.run import RunConfig, load
from pipeline.driver import tracked
from pipeline.driver.preflight import update
from pipeline.interrupts import interrupts_delayed, terminate_as_interrupt
from pipeline.run_folder import rows
from pipeline.run_folder.sources import resolve
from pipeline.run_folder.workspace import Workspace, read_json
from pipeline.tracking import runs
from pipeline.tracking.logged import is_logged, run_id_in_store, with_entry


def sync(folder: str, uri: str | None = None) -> str:
    """Logs a finished run unless it is already logged; returns a sentence with the result.

    Args:
        folder: Folder or address of the run.
        uri: Store to log to; None: the store that the run names.

    Raises:
        InputError: There is no finished run, or the store cannot be reached.
        TrackingError: The store refused.
    """
    workspace = Workspace.of(folder)
    folder = masked(folder)
    state, summary = read_json(workspace.run), read_json(workspace.summary)
    if state is None or not workspace.config.exists():
        raise InputError(f"{folder} holds no run; expected the folder that `odedit edit` wrote to (out).")
    if summary is None:
        raise InputError(f"{folder}: its run is not finished. Finish it with the command that began it, which logs it.")
    config = load(workspace.config)
    is_tracked = config.tracking.enabled
    if uri is None and state.get("logged") and (not is_tracked or is_logged(config, workspace)):
        run_id = run_id_in_store(config, workspace) if is_tracked else state["run_id"]
        return f"{folder} is logged already, as run {run_id}."
    if is_tracked and state.get("logged") is True:  # written by an earlier version, which did not say where
        update(workspace, logged=with_entry(config, workspace, state["run_id"]))
    config = _reachable(config, folder, uri)
    dataset = {
        "path": _records_path(config, workspace),
        "digest": rows.digest(workspace.records),
        "usable": summary["n"] + summary["failed"],
        "problems": summary["skipped"],
    }
    tracker = None
    with terminate_as_interrupt():
        try:
            with interrupts_delayed():
                tracker = runs.EditRun.start(
                    config, workspace, run_id_in_store(config, workspace), state["code"], dataset,
                    command=tracked.command(config, is_scored="model" in summary),
                )  # fmt: skip
                update(workspace, run_id=tracker.run_id)
            tracked.log(tracker, config, workspace, summary)
        except BaseException:
            if tracker is not None:
                tracker.finish("FAILED")
            raise
    tracker.finish_with(summary)
    return f"{folder} is logged, as run {tracker.run_id}."


def _reachable(config: RunConfig, folder: str, uri: str | None) -> RunConfig:
    """The configuration with the store to log to.

    Raises:
        InputError: No store is named, or its password is needed: `config.yaml` holds addresses without passwords.
    """
    if uri is not None:
        return replace(config, tracking=replace(config.tracking, uri=uri, enabled=True))
    if not config.tracking.enabled:
        raise InputError(f"{folder}: its run was not to be logged (tracking.enabled). Name a store with --uri.")
    if "***" in (config.tracking.uri or ""):
        raise InputError(f"{folder}: the password of {config.tracking.uri} is not kept. Give the address with --uri.")
    return config


def _records_path(config: RunConfig, workspace: Workspace) -> str:
    """Path or address of the records; the embedded benchmark's file lies where the run wrote it."""
    try:
        return resolve(config.data, workspace.out.text, config.supervision.rephrases).path
    except (InputError, OSError):
        return config.data.path
