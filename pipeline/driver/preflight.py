"""Before anything runs: settings and input are checked, records staged, and what is left to do is found."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odedit.backbones import fingerprint
from odedit.backbones.common.fingerprints import EARLIER_LENGTH, comparable
from odedit.errors import InputError
from odedit.runtime.addresses import masked, reason
from odedit.storage.location import at, delete_all
from pipeline.config.checkpoints import editor_weights, fitted, with_absolute_checkpoints
from pipeline.config.run import RunConfig, from_dict, load
from pipeline.config.values import flatten, masked_values
from pipeline.config.version import code_version, software
from pipeline.run_folder import repair, rows, sources, staging
from pipeline.run_folder.sources import Sources
from pipeline.run_folder.staging import Staged
from pipeline.run_folder.workspace import CONFIG_HEADER, Workspace, check_access, new_place, read_json, write_json
from pipeline.tracking import client
from pipeline.workers import ray_session
from pipeline.workers.model import SETTING, with_checked_store
from pipeline.workers.plan import machine_cpus, machine_gpus, make_plan

_NOT_COMPARED = ("tracking.", "training.", "out", "pipeline.")
_COMPARED_ANYWAY = ("pipeline.batch_size",)
_WEIGHTS = "backbone.weights"


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
        done = rows.finished_groups(self.workspace)
        return [group for group in range(len(self.staged.usable)) if group not in done]

    def num_done(self, pending: Sequence[int]) -> int:
        """Usable records of the groups that are not pending."""
        left = set(pending)
        return sum(count for group, count in enumerate(self.staged.usable) if group not in left)


def prepare(config: RunConfig, *, fresh: bool = False, is_storage_tried: bool = False) -> Ready:
    """Checks what can be checked, stages the input, and finds out what is left to do.

    Args:
        fresh: Whether an existing run is replaced.
        is_storage_tried: As in `check`.

    Raises:
        InputError: Something is wrong; no new folder stays behind.
    """
    config, workspace, fits = check(config, fresh=fresh, is_storage_tried=is_storage_tried)
    found = sources.resolve(config.data, config.out)
    earlier = _earlier(config, found, workspace, fresh=fresh)
    with new_place(workspace.out):
        if earlier.is_none or earlier.is_replaced:
            with staging.aside(config, found, workspace) as staged:
                if earlier.is_replaced:
                    _clear(workspace)
                else:
                    delete_all(staging.leftovers(workspace))
        else:
            staged = staging.stage(config, found, workspace)
        workspace.create()
        damage = repair.repair(workspace, staged, keep_edits=config.keep_edits)
        code = code_version()
        notes = (*fits, *earlier.notes, *([damage] if damage else []))
        _remember(workspace, earlier.settings, code)
        workspace.config.write_text(f"{CONFIG_HEADER} {code}\n{_public_yaml(config)}")
    return Ready(config, workspace, found, staged, code, notes)


def look(config: RunConfig, *, fresh: bool = False) -> Ready:
    """Runs the checks of `prepare` and stages into a temporary folder, which is deleted; for `--dry-run`."""
    config, workspace, fits = check(config, fresh=fresh)
    with _staged_aside(config) as (found, staged):
        earlier = _earlier(config, found, workspace, fresh=fresh)
        return Ready(config, workspace, found, staged, code_version(), (*fits, *earlier.notes))


def check_records(config: RunConfig) -> None:
    """Raises InputError if the records or their pictures cannot be used; writes nothing."""
    is_embedded = config.data.split is not None and config.data.pool is None
    if not is_embedded:
        with _staged_aside(config):
            pass


@contextmanager
def _staged_aside(config: RunConfig) -> Iterator[tuple[Sources, Staged]]:
    """Inside, the run's input lies staged in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        found = sources.resolve(config.data, sources.place_of_embedded(config.data, config.out, folder))
        found.identity()  # a missing file is named before its pictures' folders
        found.reader.check_roots()
        aside = Workspace.of(Path(folder) / "out")
        aside.create()
        yield found, staging.stage(config, found, aside)


def check(
    config: RunConfig,
    *,
    fresh: bool = False,
    trains: bool = False,
    servers: bool = True,
    is_storage_tried: bool = False,
) -> tuple[RunConfig, Workspace, tuple[str, ...]]:
    """Checks everything but the records and what `out` holds; leaves nothing behind.

    Args:
        fresh: Whether an existing run is replaced. A finished run that is not needs no servers.
        trains: Whether the editor's own weights are still to be made.
        servers: Whether the cluster and the MLflow server have to answer.
        is_storage_tried: Whether a folder above `out` has been written to already: storage has no rights for each
            folder, so an `out` at an address is not tried again.

    Returns:
        The configuration with full paths and settings that fit the model, its workspace, and what was changed.

    Raises:
        InputError: A setting is wrong, or a place or a server that it names cannot be used.
    """
    workspace = Workspace.of(config.out)
    if config.tracking.enabled:
        client.store_uri(config.tracking, workspace.out)
    config = with_checked_store(with_absolute_checkpoints(config))
    if workspace.out.is_local:
        for folder in (workspace.out, *workspace.folders):
            check_access(folder, "out")
    elif not is_storage_tried:
        check_access(workspace.out, "out")
    store = config.pipeline.feature_store
    if store is not None and "://" not in store and not os.path.exists(store):  # one that is there may be read alone
        check_access(at(store), SETTING)
    sources.check_apart(config.data, workspace.out)
    if ray_session.address_of(config.pipeline) is None:
        make_plan(config.pipeline, config.backbone, machine_cpus(), machine_gpus(), 1)
    if servers and (fresh or not _is_finished(config, workspace)):
        ray_session.check_reachable(config.pipeline)
        client.check(config.tracking, workspace.out)
    config, notes = fitted(config, trains=trains)  # last, since an editor that learns has the model's weights read
    return config, workspace, tuple(notes)


def _is_finished(config: RunConfig, workspace: Workspace) -> bool:
    """Whether there is nothing left to edit or to log."""
    state = read_json(workspace.run)
    is_logged = not config.tracking.enabled or (isinstance(state, dict) and state.get("logged"))
    return bool(is_logged) and workspace.summary.exists()


@dataclass(frozen=True)
class _Earlier:
    """What `out` holds of an earlier run.

    Attributes:
        settings: Settings of the run that is to begin or to go on.
        is_none: There is no earlier run.
        is_replaced: Its files are to be deleted.
        notes: What the user should know of it.
    """

    settings: Mapping[str, Any]
    is_none: bool
    is_replaced: bool
    notes: tuple[str, ...]


def _earlier(config: RunConfig, found: Sources, workspace: Workspace, *, fresh: bool) -> _Earlier:
    """Looks at `out`, and changes nothing. Raises InputError if it is another run's or holds foreign files."""
    found.reader.check_roots()
    settings = _settings(config, found)
    _check_config_is_ours(workspace)
    before, notes = _own_run(workspace, found)
    is_replaced = False
    if before is None:
        _check_room(workspace, fresh=fresh)
    elif not fresh and workspace.summary.exists() and len(str(before["settings"].get(_WEIGHTS))) == EARLIER_LENGTH:
        # The run is finished: its model is not needed, and its earlier fingerprint depends on versions of libraries.
        settings |= {_WEIGHTS: before["settings"][_WEIGHTS]}
        _check_same_run(settings, before["settings"], workspace)
    elif not fresh and (rows.parts(workspace) or settings == before["settings"] or not before.get("ended")):
        _check_same_run(settings, before["settings"], workspace)
    else:
        # Asked for, or other settings after a run that has ended without any result: there is nothing to lose.
        is_replaced = True
    return _Earlier(settings, before is None, is_replaced, tuple(notes))


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


def _check_room(workspace: Workspace, *, fresh: bool) -> None:
    """Refuses a folder without a run that holds anything that might be worth keeping."""
    if rows.parts(workspace):
        raise InputError(f"out: {workspace.out} holds results without run.json. Choose another folder (out=...).")
    # What a run that never began left behind is deleted.
    leftovers = [*staging.leftovers(workspace), *staging.cut_off(workspace)]
    stranger = workspace.out.first_file_below(leftovers) if fresh else None
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

    return yaml.safe_dump(masked_values(config.to_dict()), sort_keys=False, allow_unicode=True)


def _settings(config: RunConfig, found: Sources) -> dict[str, Any]:
    """What results depend on: settings, input files, and the model's weights; without secrets."""
    flat = flatten(config.to_dict())
    compared = {
        key: value for key, value in flat.items() if key in _COMPARED_ANYWAY or not key.startswith(_NOT_COMPARED)
    }
    model = config.backbone
    weights = {_WEIGHTS: fingerprint(model.family, model.checkpoint, dtype=model.dtype)}
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
    """Every setting of a run with that editor and objective, as if none had been given."""
    names = {kind: {"name": settings[f"{kind}.name"]} for kind in ("editor", "objective")}
    return flatten(from_dict(names).to_dict())


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
