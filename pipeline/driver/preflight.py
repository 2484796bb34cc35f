"""Checks before a run: settings, input and an earlier run in `out` are checked, and the records staged."""

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
        config: Configuration with full paths and settings that fit the model.
        workspace: Folder of the run.
        sources: Input files.
        staged: Staged records.
        code: Version of the code.
        notes: Notes for the user, on changed settings and on an earlier part of the run.
    """

    config: RunConfig
    workspace: Workspace
    sources: Sources
    staged: Staged
    code: str
    notes: tuple[str, ...] = ()

    @property
    def pending(self) -> list[int]:
        """Numbers of the groups without a result, read from the folder at each call."""
        done = rows.finished_groups(self.workspace)
        return [group for group in range(len(self.staged.usable)) if group not in done]

    def num_done(self, pending: Sequence[int]) -> int:
        """Number of usable records in groups that are not pending."""
        groups = set(pending)
        return sum(count for group, count in enumerate(self.staged.usable) if group not in groups)


def prepare(config: RunConfig, *, fresh: bool = False, is_storage_tried: bool = False) -> Ready:
    """Checks the run, stages its input, and looks for an earlier part of it.

    Args:
        fresh: Whether an existing run is replaced.
        is_storage_tried: As in `check`.

    Raises:
        InputError: A setting or the input is wrong, or `out` holds another run. No new folder is left behind.
    """
    config, workspace, fitting_notes = check(config, fresh=fresh, is_storage_tried=is_storage_tried)
    inputs = sources.resolve(config.data, config.out)
    earlier = _earlier(config, inputs, workspace, fresh=fresh)
    with new_place(workspace.out):
        if earlier.is_new or earlier.is_replaced:
            with staging.aside(config, inputs, workspace) as staged:
                if earlier.is_replaced:
                    _clear(workspace)
                else:
                    delete_all(staging.leftovers(workspace))
        else:
            staged = staging.stage(config, inputs, workspace)
        workspace.create()
        damage = repair.repair(workspace, staged, keep_edits=config.keep_edits)
        code = code_version()
        notes = (*fitting_notes, *earlier.notes, *([damage] if damage else []))
        _write_state(workspace, earlier.settings, code)
        workspace.config.write_text(f"{CONFIG_HEADER} {code}\n{_public_yaml(config)}")
    return Ready(config, workspace, inputs, staged, code, notes)


def look(config: RunConfig, *, fresh: bool = False) -> Ready:
    """As `prepare`, but stages into a temporary folder and changes nothing in `out`; for `--dry-run`."""
    config, workspace, fitting_notes = check(config, fresh=fresh)
    with _staged_aside(config) as (inputs, staged):
        earlier = _earlier(config, inputs, workspace, fresh=fresh)
        return Ready(config, workspace, inputs, staged, code_version(), (*fitting_notes, *earlier.notes))


def check_records(config: RunConfig) -> None:
    """Raises InputError if the records or their pictures cannot be used; writes nothing."""
    is_embedded = config.data.split is not None and config.data.pool is None
    if not is_embedded:
        with _staged_aside(config):
            pass


@contextmanager
def _staged_aside(config: RunConfig) -> Iterator[tuple[Sources, Staged]]:
    """Inside, the run's input is staged in a temporary folder; yields the input files and the staged records."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = sources.resolve(config.data, sources.place_of_embedded(config.data, config.out, folder))
        inputs.identity()  # raises for a missing file before the folders of pictures are checked
        inputs.reader.check_roots()
        aside = Workspace.of(Path(folder) / "out")
        aside.create()
        yield inputs, staging.stage(config, inputs, aside)


def check(
    config: RunConfig,
    *,
    fresh: bool = False,
    trains: bool = False,
    servers: bool = True,
    is_storage_tried: bool = False,
) -> tuple[RunConfig, Workspace, tuple[str, ...]]:
    """Checks everything but the records and the content of `out`; leaves nothing behind.

    Args:
        fresh: Whether an existing run is replaced. A finished run that is kept needs no servers.
        trains: Whether the editor's own weights will be trained before the run.
        servers: Whether to check that the cluster and the MLflow server answer.
        is_storage_tried: Whether a folder above `out` has been written to already. An `out` at an address is then not
            tried again, since object stores have no access rights per folder.

    Returns:
        The configuration with full paths and settings that fit the model, its workspace, and notes on the changes.

    Raises:
        InputError: A setting is wrong, or a folder, address or server that it names cannot be used.
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
    if store is not None and "://" not in store and not os.path.exists(store):  # an existing one may be read-only
        check_access(at(store), SETTING)
    sources.check_apart(config.data, workspace.out)
    if ray_session.address_of(config.pipeline) is None:
        make_plan(config.pipeline, config.backbone, machine_cpus(), machine_gpus(), 1)
    if servers and (fresh or not _is_finished(config, workspace)):
        ray_session.check_reachable(config.pipeline)
        client.check(config.tracking, workspace.out)
    config, notes = fitted(config, trains=trains)  # last, since a trained editor makes it read the model's weights
    return config, workspace, tuple(notes)


def _is_finished(config: RunConfig, workspace: Workspace) -> bool:
    """Whether everything is edited and logged."""
    state = read_json(workspace.run)
    is_logged = not config.tracking.enabled or (isinstance(state, dict) and state.get("logged"))
    return bool(is_logged) and workspace.summary.exists()


@dataclass(frozen=True)
class _Earlier:
    """An earlier run in `out`, and what becomes of it.

    Attributes:
        settings: Settings of the run that begins or is resumed.
        is_new: True when `out` holds no earlier run.
        is_replaced: True when the earlier run's files are to be deleted.
        notes: Notes on the earlier run for the user.
    """

    settings: Mapping[str, Any]
    is_new: bool
    is_replaced: bool
    notes: tuple[str, ...]


def _earlier(config: RunConfig, inputs: Sources, workspace: Workspace, *, fresh: bool) -> _Earlier:
    """Compares the run with the one in `out`. Raises InputError if it is another run, or `out` holds other files."""
    inputs.reader.check_roots()
    settings = _settings(config, inputs)
    _check_config_is_ours(workspace)
    before, notes = _own_run(workspace, inputs)
    is_replaced = False
    if before is None:
        _check_free(workspace, fresh=fresh)
    elif not fresh and workspace.summary.exists() and len(str(before["settings"].get(_WEIGHTS))) == EARLIER_LENGTH:
        # A finished run needs no model, and its older form of fingerprint depends on versions of libraries.
        settings |= {_WEIGHTS: before["settings"][_WEIGHTS]}
        _check_same_run(settings, before["settings"], workspace)
    elif not fresh and (rows.parts(workspace) or settings == before["settings"] or not before.get("ended")):
        _check_same_run(settings, before["settings"], workspace)
    else:
        # --fresh was given, or other settings after a run that ended without any result.
        is_replaced = True
    return _Earlier(settings, before is None, is_replaced, tuple(notes))


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


def _own_run(workspace: Workspace, inputs: Sources) -> tuple[dict[str, Any] | None, list[str]]:
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
            f"{workspace.run} is damaged. {workspace.config.name} says what the settings were; whether the input files "
            "are still the same cannot be checked."
        )
        return {"settings": _settings(load(workspace.config), inputs)}, [note]
    if workspace.run.exists():
        raise InputError(f"out: {workspace.run} was not written by odedit. Choose another folder (out=...).")
    return None, []


def _check_free(workspace: Workspace, *, fresh: bool) -> None:
    """Raises InputError if a folder without a run holds results, or with `fresh` any file."""
    if rows.parts(workspace):
        raise InputError(f"out: {workspace.out} holds results without run.json. Choose another folder (out=...).")
    # Left by a run that failed before its first result; deleted later.
    leftovers = [*staging.leftovers(workspace), *staging.cut_off(workspace)]
    file = workspace.out.first_file_below(leftovers) if fresh else None
    if file is not None:
        name = file.rpartition("/")[2]
        raise InputError(
            f"--fresh: {workspace.out} holds {name!r}, but no run.json: it is not a run's folder. "
            "Choose another folder (out=...), or leave out --fresh."
        )


def _clear(workspace: Workspace) -> None:
    """Deletes the files that a run wrote, and no others; run.json last, so that it works again after a kill."""
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
    for name in ("records", "pool", "calibration", "config", "summary", "profile", "report", "run"):
        getattr(workspace, name).delete()


def _public_yaml(config: RunConfig) -> str:
    """The configuration as YAML, without secrets."""
    import yaml

    return yaml.safe_dump(masked_values(config.to_dict()), sort_keys=False, allow_unicode=True)


def _settings(config: RunConfig, inputs: Sources) -> dict[str, Any]:
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
    # A setting that is newer than the run counts as its default.
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


def _write_state(workspace: Workspace, settings: Mapping[str, Any], code: str) -> None:
    """Writes `run.json`, keeping what an earlier part of the run stored."""
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
    """Replaces values of `run.json`."""
    write_json(workspace.run, (read_json(workspace.run) or {}) | values)
