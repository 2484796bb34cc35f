"""What a run has logged, and where: entry `logged` of `run.json`, by store (`tracking.uri` without its password)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from odedit.runtime.addresses import masked
from pipeline.config.run import RunConfig, TrackingConfig
from pipeline.run_folder.workspace import Workspace, read_json
from pipeline.tracking.connection import store_uri


def is_logged(config: RunConfig, workspace: Workspace) -> bool:
    """Whether the store that the configuration names has the results, and the model under the name in the registry."""
    found = _entry(config, workspace)
    wanted = _registered(config.tracking)
    return found is not None and wanted in (None, found.get("registered"))


def run_id_in_store(config: RunConfig, workspace: Workspace) -> str | None:
    """Id of the MLflow run in the store that the configuration names, if it is logged there, else of the last one."""
    found = _entry(config, workspace) or _state(workspace)
    return found.get("run_id")


def with_entry(config: RunConfig, workspace: Workspace, run_id: str) -> dict[str, Any]:
    """The entry `logged` after the results were logged to the store that the configuration names."""
    before = _state(workspace).get("logged")
    entry = {"run_id": run_id, "registered": _registered(config.tracking)}
    return (before if isinstance(before, dict) else {}) | {_store(config, workspace): entry}


def _entry(config: RunConfig, workspace: Workspace) -> Mapping[str, Any] | None:
    state = _state(workspace)
    logged = state.get("logged")
    if logged is True:  # written by an earlier version, which did not say where
        return {"run_id": state.get("run_id"), "registered": _registered(config.tracking)}
    return logged.get(_store(config, workspace)) if isinstance(logged, dict) else None


def _state(workspace: Workspace) -> Mapping[str, Any]:
    state = read_json(workspace.run)
    return state if isinstance(state, dict) else {}


def _store(config: RunConfig, workspace: Workspace) -> str:
    uri, out = config.tracking.uri, workspace.out
    if not uri or (out.is_local and uri == store_uri(replace(config.tracking, uri=None), out)):
        return "beside out"  # the database moves with the folder
    return masked(uri)


def _registered(tracking: TrackingConfig) -> str | None:
    return None if tracking.register is None else f"{tracking.register}@{tracking.alias}"
