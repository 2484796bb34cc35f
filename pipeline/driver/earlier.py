"""Decides whether a run resumes the earlier run in `out`, replaces it, or is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from odedit.backbones import fingerprint
from odedit.backbones.common.fingerprints import EARLIER_LENGTH, comparable
from odedit.errors import InputError
from odedit.runtime.addresses import masked, reason
from odedit.storage.location import delete_all
from odedit.ways.sequential import TABLES
from pipeline.config.checkpoints import editor_weights
from pipeline.config.run import RunConfig, from_dict, load
from pipeline.config.values import flatten
from pipeline.run_folder import rows, staging
from pipeline.run_folder.committed import SINGLE, SINGLE_RECORDS
from pipeline.run_folder.lock import LOCK
from pipeline.run_folder.sources import Sources
from pipeline.run_folder.workspace import CONFIG_HEADER, Workspace, read_json

_NOT_COMPARED = ("tracking.", "training.", "out", "pipeline.", "backbone.gpus", "preset")
_COMPARED_ANYWAY = ("pipeline.batch_size",)
_WEIGHTS = "backbone.weights"


@dataclass(frozen=True)
class Earlier:
    """The earlier run in `out`, and whether it is replaced.

    Attributes:
        settings: Settings of the new or resumed run.
        is_new: True when `out` holds no earlier run.
        is_replaced: True when the earlier run's files are to be deleted.
        notes: Notes on the earlier run for the user.
    """

    settings: Mapping[str, Any]
    is_new: bool
    is_replaced: bool
    notes: tuple[str, ...]


def find(
    config: RunConfig,
    inputs: Sources,
    workspace: Workspace,
    *,
    fresh: bool,
    identity: Mapping[str, Any] = MappingProxyType({}),
) -> Earlier:
    """Compares the run with the earlier run in `out`.

    Args:
        identity: What the results depend on besides settings and input files, by name.

    Raises:
        InputError: The runs differ, or `out` holds other files.
    """
    inputs.reader.check_roots()
    settings = compared_settings(config, inputs) | dict(identity)
    _check_config_is_ours(workspace)
    before, notes = _own_run(workspace, inputs, identity)
    is_replaced = False
    if before is None:
        _check_free(workspace, fresh=fresh)
    elif not fresh and workspace.summary.exists() and len(str(before["settings"].get(_WEIGHTS))) == EARLIER_LENGTH:
        # A finished run needs no model, and its older form of fingerprint depends on versions of libraries.
        settings |= {_WEIGHTS: before["settings"][_WEIGHTS]}
        _check_same_run(settings, before["settings"], workspace)
    elif not fresh and (_has_results(workspace) or settings == before["settings"] or not before.get("ended")):
        _check_same_run(settings, before["settings"], workspace)
    else:
        # --fresh was given, or other settings after a run that ended without any result.
        is_replaced = True
    return Earlier(settings, before is None, is_replaced, tuple(notes))


def _has_results(workspace: Workspace) -> bool:
    """Whether the folder holds rows of a run, or a model that is made or begun."""
    return bool(rows.parts(workspace)) or workspace.committed.exists() or workspace.training.exists()


def _check_config_is_ours(workspace: Workspace) -> None:
    """Raises InputError if the run's copy of its configuration would replace a file that the user wrote."""
    try:
        with workspace.config.open() as stream:
            # An empty or zero-filled file is left by a power failure and may be replaced.
            is_ours = stream.read(len(CONFIG_HEADER)).strip(b"\0") in (CONFIG_HEADER.encode(), b"")
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"out: {workspace.config} cannot be read: {reason(error)}.") from error
    if not is_ours:
        raise InputError(
            f"out: {workspace.config} was not written by odedit and would be replaced. Choose another folder (out=...)."
        )


def _own_run(
    workspace: Workspace, inputs: Sources, identity: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Content of the folder's run.json, or None if there is none, and notes for the user.

    The settings of a damaged run.json are read from config.yaml.

    Raises:
        InputError: run.json was not written by odedit.
    """
    state = read_json(workspace.run)
    if isinstance(state, dict) and isinstance(state.get("settings"), dict):
        return state, []
    if state is None and workspace.run.exists() and workspace.config.info().size:
        note = (
            f"{workspace.run} is damaged. the settings are read from {workspace.config.name}; whether the input files "
            "have changed cannot be checked."
        )
        return {"settings": compared_settings(load(workspace.config), inputs) | dict(identity)}, [note]
    if workspace.run.exists():
        raise InputError(f"out: {workspace.run} was not written by odedit. Choose another folder (out=...).")
    return None, []


def _check_free(workspace: Workspace, *, fresh: bool) -> None:
    """Raises InputError if a folder without a run holds results, or with `fresh` any file."""
    if rows.parts(workspace):
        raise InputError(f"out: {workspace.out} holds results without run.json. Choose another folder (out=...).")
    # Files of a run that failed before its first result; they are deleted later.
    leftovers = [*staging.leftovers(workspace), *staging.abandoned(workspace), workspace.out / LOCK]
    file = workspace.out.first_file_below(leftovers) if fresh else None
    if file is not None:
        name = file.rpartition("/")[2]
        raise InputError(
            f"--fresh: {workspace.out} holds {name!r}, but no run.json: it is not a run's folder. "
            "Choose another folder (out=...), or leave out --fresh."
        )


def is_commit(state: Any) -> bool:
    """Whether the content of a run.json is that of a run that commits, whose folder holds a model of its own."""
    return isinstance(state, dict) and "commit.way" in (state.get("settings") or {})


def clear(workspace: Workspace, edits_from: str = "") -> None:
    """Deletes the files that a run wrote, and no others; run.json last, so that a killed deletion can be repeated.

    Args:
        edits_from: Identity of the finished edits that the new run is made from, which are kept: they may be those of
            this folder.
    """
    written = (
        (workspace.results, ("part-*.parquet", ".part-*.tmp")),
        (workspace.edits, ("*.safetensors", ".*.safetensors.*.tmp")),
        (workspace.attempts, ("group-*.json", ".group-*.tmp")),
        (workspace.errors, ("*.txt",)),
    )
    for folder, patterns in written:
        delete_all([file for pattern in patterns for file in folder.glob(pattern)])
        if folder.is_local:
            with suppress(OSError):  # missing, or not empty
                os.rmdir(folder)
    if is_commit(read_json(workspace.run)):
        for folder in (*workspace.written_models, workspace.moments):
            folder.delete_folder()
        for name in TABLES:
            workspace.further_table(name).delete()
        single = workspace.out / SINGLE
        if not edits_from.startswith(f"{masked(str(single))} "):
            _clear_single(Workspace(single))
    for name in (
        *(
            "records",
            "pool",
            "calibration",
            "committed",
            "training",
            "progress",
            "problem",
            "config",
            "summary",
            "kept",
            "text",
        ),
        *("profile", "report", "run"),
    ):
        getattr(workspace, name).delete()


def _clear_single(workspace: Workspace) -> None:
    """Deletes the single edits of a run that commits, and the file of their records."""
    if workspace.run.exists():
        clear(workspace)
    workspace.out.parent.child(SINGLE_RECORDS).delete()
    if workspace.out.is_local:
        with suppress(OSError):  # missing, or not empty
            os.rmdir(workspace.out)


def compared_settings(config: RunConfig, inputs: Sources) -> dict[str, Any]:
    """Everything that results depend on: settings, input files and the model's weights; without secrets."""
    flat = flatten(config.to_dict())
    compared = {
        key: value for key, value in flat.items() if key in _COMPARED_ANYWAY or not key.startswith(_NOT_COMPARED)
    }
    model = config.backbone
    weights = {_WEIGHTS: fingerprint(model.family, model.checkpoint, dtype=model.dtype)}
    weights |= editor_weights(config)
    return {key: _without_secrets(value) for key, value in (compared | inputs.identity() | weights).items()}


def _without_secrets(value: Any) -> Any:
    """The value with secrets masked, and a hash that shows whether they have changed."""
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if not isinstance(value, str) or masked(value) == value:
        return value
    return f"{masked(value)} [{hashlib.sha256(value.encode()).hexdigest()[:8]}]"


def _check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], workspace: Workspace) -> None:
    """Raises InputError if the settings or input files `now` differ from those of the run in `out`."""
    # A setting that did not exist when the run was made has its default.
    then = {key: value for key, value in _defaults(now).items() if key in now} | dict(then)
    now = {key: comparable(value, then.get(key)) for key, value in now.items()}
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


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every setting of a run with that editor and objective."""
    names = {kind: {"name": settings[f"{kind}.name"]} for kind in ("editor", "objective")}
    return flatten(from_dict(names).to_dict())
