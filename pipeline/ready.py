"""Before anything runs: settings and input are checked, records staged, and what is left to do is found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from odedit.addresses import masked, reason
from odedit.backbones import fingerprint, load_processor
from odedit.errors import InputError
from odedit.locations import delete_all
from pipeline import intact, results, sources, staging, tracking
from pipeline.checkpoints import editor_weights, with_absolute_checkpoints
from pipeline.config import RunConfig, from_dict, load
from pipeline.features import with_checked_store
from pipeline.sources import Sources
from pipeline.staging import Staged
from pipeline.version import code_version, software
from pipeline.workspace import CONFIG_HEADER, Workspace, check_access, read_json, write_json

_NOT_COMPARED = ("tracking.", "training.", "out", "pipeline.")
_COMPARED_ANYWAY = ("pipeline.batch_size",)


@dataclass(frozen=True)
class Ready:
    """A run that has passed every check that needs no worker.

    Attributes:
        notes: What the user should know of the folder's earlier part of the run.
    """

    config: RunConfig
    workspace: Workspace
    sources: Sources
    staged: Staged
    code: str
    notes: tuple[str, ...] = ()

    @property
    def pending(self) -> list[int]:
        """Groups without a result, as the folder has it at this moment."""
        done = results.finished_groups(self.workspace)
        return [group for group in range(len(self.staged.usable)) if group not in done]

    def num_done(self, pending: Sequence[int]) -> int:
        """Usable records of the groups that are not pending."""
        left = set(pending)
        return sum(count for group, count in enumerate(self.staged.usable) if group not in left)


def prepare(config: RunConfig, *, fresh: bool = False) -> Ready:
    """Checks what can be checked, stages the input, and finds out what is left to do."""
    workspace = Workspace.of(config.out)
    if config.tracking.enabled:
        tracking.store_uri(config.tracking, workspace.out)
    load_processor(config.backbone.family, config.backbone.checkpoint)
    config = with_checked_store(with_absolute_checkpoints(config))
    check_access(workspace.out, "out")
    found = sources.resolve(config.data, config.out)
    found.reader.check_roots()
    settings = _settings(config, found)
    _check_config_is_ours(workspace)
    # Only now: a mistake in the settings must not cost the results of an earlier run.
    before, notes = _own_run(workspace, found)
    if before is None:
        _make_room(workspace, fresh=fresh)
    elif not fresh and (results.parts(workspace) or settings == before["settings"] or not before.get("ended")):
        _check_same_run(settings, before["settings"], workspace)
    else:
        # Asked for, or other settings after a run that has ended without any result: there is nothing to lose.
        with staging.aside(config, found, workspace):
            _clear(workspace)
    workspace.create()
    staged = staging.stage(config, found, workspace)
    damage = intact.repair(workspace, staged, keep_edits=config.keep_edits)
    code = code_version()
    ready = Ready(config, workspace, found, staged, code, (*notes, *([damage] if damage else [])))
    _remember(workspace, settings, code)
    workspace.config.write_text(f"{CONFIG_HEADER} {code}\n{_public_yaml(config)}")
    return ready


def _check_config_is_ours(workspace: Workspace) -> None:
    """Raises InputError if the run's copy of its configuration would replace a file that the user wrote."""
    try:
        with workspace.config.open() as stream:
            # A file that lost its content with the machine's power may be replaced.
            is_ours = stream.read(len(CONFIG_HEADER)).strip(b"\0") in (CONFIG_HEADER.encode(), b"")
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"out: {workspace.config} cannot be read: {reason(error)}.") from error
    if not is_ours:
        raise InputError(
            f"out: {workspace.config} was not written by odedit and would be replaced. Choose another folder (out=...)."
        )


def _own_run(workspace: Workspace, found: Sources) -> tuple[dict[str, Any] | None, list[str]]:
    """What the folder's run.json says, or None if there is none, and what the user should know of it.

    A file that was cut off is made up for by the settings in config.yaml.

    Raises:
        InputError: It is something else's.
    """
    state = read_json(workspace.run)
    if isinstance(state, dict) and isinstance(state.get("settings"), dict):
        return state, []
    if state is None and workspace.run.exists() and workspace.config.info().size:
        note = (
            f"{workspace.run} is damaged. {workspace.config.name} says what the settings were; whether the input files "
            "are still the same cannot be checked."
        )
        return {"settings": _settings(load(workspace.config), found)}, [note]
    if workspace.run.exists():
        raise InputError(f"out: {workspace.run} was not written by odedit. Choose another folder (out=...).")
    return None, []


def _make_room(workspace: Workspace, *, fresh: bool) -> None:
    """Removes what a run that never began left behind; refuses a folder with anything that might be worth keeping."""
    if results.parts(workspace):
        raise InputError(f"out: {workspace.out} holds results without run.json. Choose another folder (out=...).")
    staging.remove_leftovers(workspace)
    stranger = workspace.out.first_file_below() if fresh else None
    if stranger is not None:
        name = stranger.rpartition("/")[2]
        raise InputError(
            f"--fresh: {workspace.out} holds {name!r}, but no run.json: it is not a run's folder. "
            "Choose another folder (out=...), or leave out --fresh."
        )


def _clear(workspace: Workspace) -> None:
    """Deletes a run's own files, and nothing else that may lie there; run.json last, so that a kill can be repeated."""
    written = (
        (workspace.results, ("part-*.parquet", ".part-*.tmp")),
        (workspace.edits, ("*.safetensors", ".*.safetensors.*.tmp")),
        (workspace.attempts, ("group-*.json", ".group-*.tmp")),
        (workspace.errors, ("*.txt",)),
    )
    for folder, patterns in written:
        delete_all([file for pattern in patterns for file in folder.glob(pattern)])
        if folder.is_local:
            with suppress(OSError):  # not there, or it holds something else
                os.rmdir(folder)
    for name in ("records", "pool", "calibration", "config", "summary", "profile", "report", "run"):
        getattr(workspace, name).delete()


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
    # A setting that is newer than the run had its default then.
    then = {key: value for key, value in _defaults(now).items() if key in now} | dict(then)
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
    """Every setting of a run with that editor and objective, as if none had been given."""
    names = {kind: {"name": settings[f"{kind}.name"]} for kind in ("editor", "objective")}
    return tracking.flatten(from_dict(names).to_dict())


def _remember(workspace: Workspace, settings: Mapping[str, Any], code: str) -> None:
    before = read_json(workspace.run) or {}
    now = {
        "settings": settings,
        "code": before.get("code", code),
        "software": software(),
        "run_id": before.get("run_id"),
        "logged": before.get("logged", False),
        "seconds": before.get("seconds", 0.0),
        "ended": before.get("ended", False),
    }
    write_json(workspace.run, now)


def update(workspace: Workspace, **values: Any) -> None:
    """Changes what `run.json` says."""
    write_json(workspace.run, (read_json(workspace.run) or {}) | values)
