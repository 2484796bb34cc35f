"""A run that commits its records to one model: makes the model, writes it, and scores every record on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rich.console import Console

from odedit import editors
from odedit.data.records import RawRecord
from odedit.editing.files import read_info
from odedit.errors import InputError, counted
from odedit.runtime.addresses import below
from odedit.storage.location import Location
from odedit.ways.base import Fit
from odedit.ways.common.files import read_committed_info
from pipeline.config.run import RunConfig, apply_override, from_dict, load, read_yaml
from pipeline.console import say
from pipeline.driver.preflight import Ready, prepare, update
from pipeline.driver.progress import Steps
from pipeline.driver.run import Outcome, announce, run, score_into
from pipeline.interrupts import terminate_as_interrupt
from pipeline.run_folder import rows, staging
from pipeline.run_folder.contradictions import LeftOut, OnConflict, find
from pipeline.run_folder.sources import Sources, absolute, identity_of
from pipeline.run_folder.workspace import Workspace, read_json
from pipeline.workers import ray_session
from pipeline.workers.committing import CommitJob, way_of
from pipeline.workers.plan import Job, Plan, ScoredModel

SINGLE = "single"
"""Folder in `out` of the single edits that a way uses."""
_IS_WRITTEN = "model_written"


def with_edits_of(config: RunConfig, edits_from: str | None) -> RunConfig:
    """The run with the editor of the finished edits.

    Raises:
        InputError: `edits_from` holds no run of single edits.
    """
    if edits_from is None:
        return config
    workspace = Workspace.of(edits_from)
    if not workspace.config.exists() or not rows.parts(workspace):
        raise InputError(
            f"--from: {workspace.out} holds no run; expected the folder that `odedit edit` wrote to (out)."
        )
    return replace(config, editor=load(workspace.config).editor)


def changed(run_folder: str, remove: Sequence[str], add: str | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run that changes the model of an earlier one.

    Args:
        run_folder: Folder or address of the earlier run of `odedit commit`.
        remove: Ids of records to take out of the model.
        add: File of records to commit in addition.
        overrides: Further settings, of which `out` must be one.

    Raises:
        InputError: There is no such model, or the new one would replace it.
    """
    before = Workspace.of(run_folder)
    if not before.config.exists() or not (read_json(before.run) or {}).get(_IS_WRITTEN):
        raise InputError(
            f"--change: {before.out} holds no committed model; expected `out` of a finished `odedit commit`."
        )
    values = read_yaml(before.config)
    section = values.get("commit") or {}
    section["remove"] = [*section.get("remove", ()), *remove]
    section["add"] = [*section.get("add", ()), *([absolute(add)] if add is not None else [])]
    section["start"] = absolute(run_folder)
    config = from_dict_with(values | {"commit": section}, overrides)
    if Workspace.of(config.out).out.path == before.out.path:
        raise InputError(
            "out: the changed model goes to a folder of its own, so that the earlier one stays; set out=..."
        )
    return config


def from_dict_with(values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The run described by a mapping, with overrides applied."""
    for text in overrides:
        apply_override(values, text)
    return from_dict(values)


def check(config: RunConfig, edits_from: str | None) -> None:
    """Checks what only a run that commits needs; starts nothing.

    Raises:
        InputError: The way cannot use the editor, needs a pool that is not there, or uses no finished edits.
    """
    way = way_of(config)
    way.check(editors.find(config.editor.name)(config.editor.settings), config.editor.name)
    if way.needs_pool and config.data.pool is None and config.data.split is None:
        raise InputError(
            f"commit.way: {config.commit_way!r} learns from records of a pool, and data.pool is not set. Set it to a "
            "file of other records (the training file), or choose another way."
        )
    if edits_from is not None and not way.uses_edits:
        raise InputError(
            f"--from: commit.way {config.commit_way!r} trains all records together and uses no finished edits. Leave "
            "--from out, or choose another way."
        )


def commit(
    config: RunConfig,
    console: Console,
    *,
    edits_from: str | None = None,
    fresh: bool = False,
    parent_run: str | None = None,
) -> Outcome:
    """Makes or resumes one model of all records of a run, and scores them on it.

    Args:
        config: Result of `load_commit`.
        console: Console for progress.
        edits_from: Folder or address of a run whose edits are used, for a way that uses finished edits.
        fresh: Whether to delete an earlier run in `out` first.
        parent_run: Id of the MLflow run that the run is nested in.

    Raises:
        InputError: The input or the settings are wrong, records contradict each other, or `out` holds another run.
        GraphError: The workers could not continue.
        TrackingError: The results are complete, but MLflow could not be written to.
    """
    config = with_edits_of(config, edits_from)
    check(config, edits_from)
    conflicts = Conflicts(config)
    ready = prepare(config, fresh=fresh, check_staged=conflicts, identity=further_inputs(config))
    announce(ready, console)
    with terminate_as_interrupt(), ray_session.shared():
        if not _is_made(ready.workspace):
            edits = _finished_edits(ready, edits_from, console, fresh=fresh)
            start = _start(ready.config)
            left_out = frozenset(conflicts.left_out.reasons)
            _make(ready, CommitJob(_job(ready), left_out, edits, None if start is None else start.committed), console)
        return score_into(ready, console, _scored(ready, conflicts.left_out), parent_run=parent_run)


def _is_made(workspace: Workspace) -> bool:
    """Whether the model is complete and still there."""
    is_written = bool((read_json(workspace.run) or {}).get(_IS_WRITTEN))
    return is_written and workspace.committed.exists() and workspace.model.exists()


def commit_many(
    configs: Sequence[RunConfig], console: Console, *, fresh: bool = False, parent_run: str | None = None
) -> list[Outcome]:
    """Makes or resumes several models, one after another; see `commit`.

    Raises:
        InputError: See `commit`; the message has the name of the run.
    """
    outcomes = []
    for number, config in enumerate(configs, start=1):
        say(console, f"Model {number} of {len(configs)}: {config.name}")
        try:
            outcomes.append(commit(config, console, fresh=fresh, parent_run=parent_run))
        except InputError as error:
            raise InputError(f"{config.name}: {error}") from error
    return outcomes


def further_inputs(config: RunConfig) -> dict[str, str]:
    """Further files that the model depends on, with their sizes and times."""
    assert config.commit is not None
    names = {f"commit.add {number}": path for number, path in enumerate(config.commit.settings.add)}
    start = _start(config)
    if start is not None:
        names["commit.start"] = str(start.committed)
    return {name: identity_of(path, "commit.add" if "add" in name else name) for name, path in names.items()}


def _start(config: RunConfig) -> Workspace | None:
    """Folder of the run whose model is changed."""
    assert config.commit is not None
    start = config.commit.settings.start
    return None if start is None else Workspace.of(start)


class Conflicts:
    """Check of staged records for removed ones, contradictions and duplicates.

    Attributes:
        left_out: Records that do not go into the model, known after the check.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.commit is not None
        self._on_conflict: OnConflict = config.commit.settings.on_conflict
        self._removed = frozenset(config.commit.settings.remove)
        self.left_out = LeftOut()

    def __call__(self, workspace: Workspace, sources: Sources) -> None:
        """Raises InputError for a contradiction that is to be refused, or a removed record that does not exist."""
        every = staging.usable_records(workspace.records)
        removed: dict[str, int] = {}

        def kept() -> Iterator[RawRecord]:
            for record in every:
                if record.edit_id in self._removed:
                    removed[record.edit_id] = record.index
                else:
                    yield record

        left_out = find(kept(), sources.reader, self._on_conflict)
        unknown = sorted(self._removed - removed.keys())
        if unknown:
            raise InputError(f"commit.remove: no usable record has the id {unknown[0]!r}. `odedit edits` lists them.")
        reasons = {index: "left out: removed from the model (commit.remove)." for index in removed.values()}
        self.left_out = replace(left_out, reasons={**left_out.reasons, **reasons})


def _scored(ready: Ready, left_out: LeftOut) -> ScoredModel:
    """The model as the scoring workers load it."""
    workspace, config = ready.workspace, ready.config
    info = read_committed_info(workspace.committed)
    problems = info.details["problems"]
    reasons = dict(left_out.reasons)
    if problems:
        every = staging.usable_records(workspace.records)
        reasons |= {record.index: problems[record.edit_id] for record in every if record.edit_id in problems}
    is_plain = way_of(config).is_plain
    return ScoredModel(
        checkpoint=str(workspace.model) if is_plain else None,
        committed=None if is_plain else str(workspace.committed),
        edited=left_out.edited,
        left_out=reasons,
        fits={edit_id: Fit(**fit) for edit_id, fit in info.details["fits"].items()},
        columns={"model": config.commit_way},
    )


def _job(ready: Ready, plan: Plan | None = None) -> Job:
    job = Job(ready.config, ready.sources, ready.workspace)
    if plan is None:
        return job
    return replace(job, device=plan.device, num_threads=plan.threads_per_actor, memory_share=plan.memory_share)


def _finished_edits(
    ready: Ready, edits_from: str | None, console: Console, *, fresh: bool
) -> Mapping[str, Location] | None:
    """Files of the single edits by edit id, made first unless they are given; None for a way that uses none."""
    if not way_of(ready.config).uses_edits:
        return None
    assert ready.config.commit is not None
    added: tuple[str, ...] = ready.config.commit.settings.add
    if _start(ready.config) is not None and edits_from is None and not added:
        return {}
    if edits_from is None:
        out = below(ready.config.out, SINGLE)
        say(console, f"Single edits first, in {Workspace.of(out).out}:")
        tracking = replace(ready.config.tracking, enabled=False)
        single = replace(ready.config, commit=None, out=out, keep_edits=True, tracking=tracking)
        if _start(ready.config) is not None:  # the edits of the other records are in the model that is changed
            single = replace(single, data=replace(single.data, path=added[-1], limit=None))
        workspace = run(single, console, fresh=fresh).workspace
    else:
        workspace = Workspace.of(edits_from)
    edited = rows.read_rows(rows.parts(workspace), ("edit_id", "status"), statuses=(rows.EDITED,))
    files = {row["edit_id"]: workspace.edit(row["edit_id"]) for row in edited}
    _check_same_records(ready, files)
    return files


def _check_same_records(ready: Ready, files: Mapping[str, Location]) -> None:
    """Raises InputError if a finished edit answers another question, or otherwise, than the record of its name."""
    for record in staging.usable_records(ready.workspace.records):
        if record.edit_id not in files:
            continue
        info = read_info(files[record.edit_id])
        if (info.prompt, info.target) != (record.fields["src"], record.fields["alt"]):
            raise InputError(
                f"--from: the edit {record.edit_id} there answers {info.prompt!r} with {info.target!r}, the record "
                f"answers {record.fields['src']!r} with {record.fields['alt']!r}. Give the run of these records."
            )


def _make(ready: Ready, commit_job: CommitJob, console: Console) -> None:
    """Makes the model and writes it, or goes on with both."""
    from pipeline.workers import training_group

    workspace, config = ready.workspace, ready.config
    num_groups = len(ready.staged.usable)
    if not workspace.committed.exists() or workspace.model.exists():
        for folder in workspace.written_models:
            folder.delete_folder()
    with ExitStack() as stack:
        plan = stack.enter_context(ray_session.connected(config.pipeline, config.backbone, num_groups, console))
        # Again, since Ray has installed a signal handler that exits the process at once.
        stack.enter_context(terminate_as_interrupt())
        num_workers = plan.num_actors if way_of(config).is_parallel else 1
        device = f"{counted(num_workers, 'worker')} on {plan.device}"
        say(
            console,
            f"Making one model of {counted(ready.staged.num_usable, 'record')} ({config.commit_way}, {device}).",
        )
        steps = stack.enter_context(Steps(console))

        def show(progress: Mapping[str, Any]) -> None:
            steps.observe(progress["doing"], progress["number"], progress["total"], progress["figures"])

        training_group.train(replace(commit_job, job=_job(ready, plan)), plan, num_workers, show)
    for file in (workspace.training, workspace.progress):
        file.delete()
    update(workspace, **{_IS_WRITTEN: True})
