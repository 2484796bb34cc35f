"""Checks of settings, input and an earlier run in `out`, before a run, and staging of its records."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from odedit.storage.location import at, delete_all
from pipeline.config import presets
from pipeline.config.checkpoints import fitted, with_absolute_checkpoints
from pipeline.config.run import RunConfig
from pipeline.config.values import masked_values
from pipeline.config.version import code_version, software
from pipeline.driver.earlier import clear, find
from pipeline.run_folder import repair, rows, sources, staging
from pipeline.run_folder.sources import Sources
from pipeline.run_folder.staging import CheckStaged, Staged
from pipeline.run_folder.workspace import (
    CONFIG_HEADER,
    Workspace,
    check_access,
    new_local_folder,
    read_json,
    write_json,
)
from pipeline.tracking import connection, logged
from pipeline.workers import ray_session
from pipeline.workers.model import SETTING, with_checked_store
from pipeline.workers.plan import ScoredModel, machine_cpus, machine_gpus, make_plan


@dataclass(frozen=True)
class Ready:
    """A run that has passed every check that needs no worker.

    Attributes:
        config: Configuration with full paths and settings that fit the model.
        workspace: Folder of the run.
        sources: Input files.
        staged: Staged records.
        code: Version of the code.
        notes: Notes for the user, on changed settings and on the earlier run in `out`.
        origins: Number of records by name of the supervision and by its origin; only of a preview.
        scored: Model that the records are scored on; None: every record is edited by itself.
    """

    config: RunConfig
    workspace: Workspace
    sources: Sources
    staged: Staged
    code: str
    notes: tuple[str, ...] = ()
    origins: Mapping[str, Counter[str]] = field(default_factory=dict)
    scored: ScoredModel | None = None

    @property
    def pending(self) -> list[int]:
        """Numbers of the groups without a result, read from the folder at each call."""
        done = rows.finished_groups(self.workspace)
        return [group for group in range(len(self.staged.usable)) if group not in done]

    def num_done(self, pending: Sequence[int]) -> int:
        """Number of usable records in groups that are not pending."""
        groups = set(pending)
        return sum(count for group, count in enumerate(self.staged.usable) if group not in groups)


def prepare(
    config: RunConfig,
    *,
    fresh: bool = False,
    is_storage_tried: bool = False,
    check_staged: CheckStaged | None = None,
    identity: Mapping[str, Any] = MappingProxyType({}),
    added: Sequence[str] = (),
) -> Ready:
    """Checks the run, stages its input, and decides whether it resumes an earlier run in `out`.

    The caller holds the lock of `out` (`pipeline.run_folder.lock`).

    Args:
        fresh: Whether an existing run is replaced.
        is_storage_tried: Whether storage above `out` has been written to already, as in `check`.
        check_staged: Further check of the staged records.
        identity: What the results depend on besides settings and input files, by name.
        added: `Sources.added`.

    Raises:
        InputError: A setting or the input is wrong, or `out` holds another run. No new folder stays.
    """
    config, workspace, fitting_notes = check(config, fresh=fresh, is_storage_tried=is_storage_tried)
    inputs = replace(sources.resolve(config.data, config.out, config.supervision.rephrases), added=tuple(added))
    earlier = find(config, inputs, workspace, fresh=fresh, identity=identity)
    with new_local_folder(workspace.out):
        if earlier.is_new or earlier.is_replaced:
            with staging.staged_aside(config, inputs, workspace, check_staged) as staged:
                if earlier.is_replaced:
                    clear(workspace, identity.get("--from", ""))
                else:
                    delete_all(staging.leftovers(workspace))
        else:
            staged = staging.stage(config, inputs, workspace)
            if check_staged is not None:
                check_staged(workspace, inputs)
        workspace.create()
        damage = repair.repair(workspace, staged, keep_edits=config.keep_edits)
        code = code_version()
        notes = (*fitting_notes, *earlier.notes, *([damage] if damage else []))
        _write_state(workspace, earlier.settings, code)
        workspace.config.write_text(f"{CONFIG_HEADER} {code}\n{_public_yaml(config)}")
    return Ready(config, workspace, inputs, staged, code, notes)


def preview(
    config: RunConfig,
    *,
    fresh: bool = False,
    check_staged: CheckStaged | None = None,
    identity: Mapping[str, Any] = MappingProxyType({}),
    added: Sequence[str] = (),
) -> Ready:
    """As `prepare`, but stages into a temporary folder and changes nothing in `out`; for `--dry-run`."""
    config, workspace, fitting_notes = check(config, fresh=fresh)
    with _staged_for_check(config, added) as (inputs, staged, aside):
        if check_staged is not None:
            check_staged(aside, inputs)
        earlier = find(config, inputs, workspace, fresh=fresh, identity=identity)
        notes = (*fitting_notes, *earlier.notes)
        return Ready(config, workspace, inputs, staged, code_version(), notes, staging.origins(config, aside, inputs))


def check_records(config: RunConfig) -> None:
    """Raises InputError if the records or their pictures cannot be used; writes nothing."""
    is_embedded = config.data.split is not None and config.data.pool is None
    if not is_embedded:
        with _staged_for_check(config):
            pass


@contextmanager
def _staged_for_check(config: RunConfig, added: Sequence[str] = ()) -> Iterator[tuple[Sources, Staged, Workspace]]:
    """The run's input files, and its records, staged in a temporary folder that exists inside the block."""
    with tempfile.TemporaryDirectory() as folder:
        rephrases = config.supervision.rephrases
        out = sources.out_of_dry_run(config.data, config.out, folder, rephrases)
        inputs = replace(sources.resolve(config.data, out, rephrases), added=tuple(added))
        inputs.identity()  # raises for a missing file before the folders of pictures are checked
        inputs.reader.check_roots()
        aside = Workspace.of(Path(folder) / "out")
        aside.create()
        yield inputs, staging.stage(config, inputs, aside), aside


def check(
    config: RunConfig,
    *,
    fresh: bool = False,
    trains: bool = False,
    servers: bool = True,
    is_storage_tried: bool = False,
) -> tuple[RunConfig, Workspace, tuple[str, ...]]:
    """Checks everything except the records and the content of `out`; writes no files that stay.

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
        connection.store_uri(config.tracking, workspace.out)
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
        connection.check(config.tracking, workspace.out)
    config, notes = fitted(config, trains=trains)  # last, since a trained editor makes it read the model's weights
    preset = () if config.preset is None else (f"{presets.find(config.preset)}.",)
    return config, workspace, (*preset, *notes, *_without_effect(config))


def _without_effect(config: RunConfig) -> Iterator[str]:
    """Notes on settings of the objective that differ from their defaults and cannot change an edit.

    Settings that only other objectives have are left out: a study may set them once for all its arms.
    """
    settings = config.objective.settings
    for name, reason in settings.without_effect.items():
        if getattr(settings, name) != getattr(type(settings)(), name):
            yield f"objective.{name} has no effect: {reason}."


def _is_finished(config: RunConfig, workspace: Workspace) -> bool:
    """Whether everything is edited and logged."""
    is_logged = not config.tracking.enabled or logged.is_logged(config, workspace)
    return is_logged and workspace.summary.exists()


def _public_yaml(config: RunConfig) -> str:
    """The configuration as YAML, without secrets."""
    import yaml

    return yaml.safe_dump(masked_values(config.to_dict()), sort_keys=False, allow_unicode=True)


def _write_state(workspace: Workspace, settings: Mapping[str, Any], code: str) -> None:
    """Writes `run.json`; state of an earlier part of the run is kept."""
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
    write_json(workspace.run, before | now)


def update(workspace: Workspace, **values: Any) -> None:
    """Replaces values of `run.json`."""
    write_json(workspace.run, (read_json(workspace.run) or {}) | values)
