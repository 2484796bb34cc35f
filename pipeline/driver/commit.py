"""A run that commits its records to one model: makes the model, writes it, and scores every record on it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from odedit import editors
from odedit.backbones import fingerprint
from odedit.backbones.common.fingerprints import comparable, mismatch
from odedit.data.records import RawRecord
from odedit.editing.files import read_info
from odedit.errors import InputError, counted
from odedit.runtime.addresses import below, masked
from odedit.storage.location import Location
from odedit.ways.base import Fit
from odedit.ways.common.files import read_committed_info
from pipeline.config.run import RunConfig, apply_override, from_dict, load, read_yaml
from pipeline.console import say
from pipeline.driver.earlier import is_commit
from pipeline.driver.preflight import Ready, prepare, update
from pipeline.driver.progress import Steps
from pipeline.driver.run import Outcome, announce, job_of, run, score_into
from pipeline.interrupts import terminate_as_interrupt
from pipeline.run_folder import rows, staging
from pipeline.run_folder.committed import SINGLE, SINGLE_RECORDS, is_plain
from pipeline.run_folder.contradictions import LeftOut, OnConflict, find
from pipeline.run_folder.lock import alone
from pipeline.run_folder.pictures import has_embedded_pictures
from pipeline.run_folder.sources import Sources, absolute, identity_of, with_absolute_paths
from pipeline.run_folder.workspace import Workspace, read_json
from pipeline.workers import ray_session
from pipeline.workers.committing import CommitJob, way_of
from pipeline.workers.plan import Plan, ScoredModel

_IS_WRITTEN = "model_written"
TRAINED_GROUPS_PER_WORKER = 8
"""Groups of records that one worker trains on a machine without GPU: training takes longer than single edits."""


def with_edits_of(config: RunConfig, edits_from: str | None) -> RunConfig:
    """The run with the method of the finished edits: editor, objective, stop rule and supervision.

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
    made = load(workspace.config)
    return replace(
        config,
        editor=made.editor,
        objective=made.objective,
        stopping=made.stopping,
        supervision=made.supervision,
    )


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
    # Who uses the registered model is not given another one unasked.
    tracking = {name: value for name, value in (values.get("tracking") or {}).items() if name != "register"}
    config = from_dict_with(values | {"commit": section, "tracking": tracking}, overrides)
    if Workspace.of(config.out).out.path == before.out.path:
        raise InputError(
            "out: the changed model goes to a folder of its own, so that the earlier one stays; set out=..."
        )
    return config


def from_dict_with(values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The run described by a mapping, with overrides applied."""
    for text in overrides:
        apply_override(values, text)
    return replace(from_dict(values), keep_edits=False)


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
    _check_folders(Workspace.of(config.out))
    _check_start(config)


def _check_folders(workspace: Workspace) -> None:
    """Raises InputError if a folder that would be replaced was not written by a run that commits."""
    if is_commit(read_json(workspace.run)):
        return
    for folder in workspace.written_models:
        if folder.is_local and folder.exists():
            raise InputError(
                f"out: {folder} exists, and was not written by `odedit commit`. Choose another folder (out=...)."
            )


def _check_start(config: RunConfig) -> None:
    """Raises InputError unless the model that is changed has the run's way, editor and unedited model."""
    start = _start(config)
    if start is None:
        return
    assert config.commit is not None
    info = read_committed_info(start.committed)
    model = config.backbone
    now = {"commit.way": config.commit.name, "editor.name": config.editor.name}
    now |= {f"editor.{name}": value for name, value in _plain(config.editor.settings).items()}
    then = {"commit.way": info.way, "editor.name": info.editor}
    then |= {f"editor.{name}": value for name, value in info.editor_config.items()}
    for name, value in now.items():
        if then.get(name) != value:
            raise InputError(
                f"{name}: got {value!r}, but the model in {start.out} was made with {then.get(name)!r}. A changed "
                "model keeps the way and the editor; leave the setting out, or commit all records anew."
            )
    removed = [edit_id for edit_id in config.commit.settings.remove if edit_id in info.edit_ids]
    if removed and not way_of(config).can_remove:
        raise InputError(
            f"commit.remove: {removed[0]!r} cannot be taken out of the model in {start.out}: with commit.way "
            f"{info.way!r} the later edits were made on top of it. Commit all records anew without it."
        )
    found = fingerprint(model.family, model.checkpoint, dtype=model.dtype)
    if info.fingerprint != comparable(found, info.fingerprint):
        raise InputError(
            f"backbone.checkpoint: the model in {start.out} was committed to other weights than {model.checkpoint!r}: "
            f"it was made {mismatch(info.fingerprint, found)}."
        )


def _plain(settings: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return values


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
        InputError: The input or the settings are wrong, records contradict each other, or `out` holds another run, or
            another process writes to it.
        GraphError: The workers could not continue.
        TrackingError: The results are complete, but MLflow could not be written to.
    """
    # Relative paths of the data are read from the run's own configuration when its model is changed.
    config = replace(with_edits_of(config, edits_from), data=with_absolute_paths(config.data))
    check(config, edits_from)
    conflicts = Conflicts(config, edits_from)
    with alone(config.out, "out"):
        ready = prepare(config, fresh=fresh, check_staged=conflicts, identity=further_inputs(config, edits_from))
        announce(ready, console)
        with terminate_as_interrupt(), ray_session.shared():
            if not _is_made(ready.workspace):
                start = _start(ready.config)
                left_out = frozenset(conflicts.left_out.reasons)
                edits = _finished_edits(ready, edits_from, left_out, console, fresh=fresh)
                _make(ready, left_out, edits, start, console)
            return score_into(ready, console, _scored(ready, conflicts.left_out), parent_run=parent_run)


def _is_made(workspace: Workspace) -> bool:
    """Whether the model is complete and still there."""
    is_written = bool((read_json(workspace.run) or {}).get(_IS_WRITTEN))
    return is_written and workspace.committed.exists() and workspace.model.is_folder()


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


def further_inputs(config: RunConfig, edits_from: str | None = None) -> dict[str, str]:
    """Further files that the model depends on, with their sizes and times."""
    assert config.commit is not None
    names = {f"commit.add {number}": path for number, path in enumerate(config.commit.settings.add)}
    start = _start(config)
    if start is not None:
        names["commit.start"] = str(start.committed)
    found = {name: masked(identity_of(path, name.partition(" ")[0])) for name, path in names.items()}
    if edits_from is not None:
        digest = hashlib.sha256()
        for file in Workspace.of(edits_from).edits.glob("*.safetensors"):
            info = file.info()
            digest.update(f"{file.name} {info.size} {info.mtime_ns}".encode())
        found["--from"] = f"{masked(str(Workspace.of(edits_from).out))} ({digest.hexdigest()[:16]})"
    return found


def _start(config: RunConfig) -> Workspace | None:
    """Folder of the run whose model is changed."""
    assert config.commit is not None
    start = config.commit.settings.start
    return None if start is None else Workspace.of(start)


class Conflicts:
    """Check of staged records for removed ones, contradictions and duplicates, and of what single edits need.

    Args:
        edits_from: Folder or address of a run whose edits are used.

    Attributes:
        left_out: Records that do not go into the model, known after the check.
    """

    def __init__(self, config: RunConfig, edits_from: str | None = None) -> None:
        assert config.commit is not None
        self._config = config
        self._makes_edits = edits_from is None and way_of(config).uses_edits
        self._on_conflict: OnConflict = config.commit.settings.on_conflict
        self._removed = frozenset(config.commit.settings.remove)
        self.left_out = LeftOut()

    def __call__(self, workspace: Workspace, sources: Sources) -> None:
        """Checks the records.

        Raises:
            InputError: A contradiction is to be refused, a removed record does not exist, or a single edit cannot be
                made.
        """
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
        if self._makes_edits and _have_own_file(self._config):
            for record in _to_edit(self._config, workspace, self.left_out.reasons):
                if has_embedded_pictures(record):
                    raise InputError(
                        f"data.path: the pictures of {record.where} lie in the packed folder or table. Single edits "
                        "for a model that is changed, or extended by commit.add, need pictures that are files "
                        f"(commit.way {self._config.commit_way!r}). Give data.path with such pictures, or finished "
                        "edits of all records with --from."
                    )


def _scored(ready: Ready, left_out: LeftOut) -> ScoredModel:
    """The model as the scoring workers load it."""
    workspace, config = ready.workspace, ready.config
    info = read_committed_info(workspace.committed)
    problems = info.details["problems"]
    reasons = dict(left_out.reasons)
    if problems:
        every = staging.usable_records(workspace.records)
        reasons |= {record.index: problems[record.edit_id] for record in every if record.edit_id in problems}
    # A checkpoint at an address cannot be loaded; its parameters act on the unedited model instead.
    is_checkpoint = is_plain(workspace.model) and workspace.model.is_local
    return ScoredModel(
        checkpoint=str(workspace.model) if is_checkpoint else None,
        committed=None if is_checkpoint else str(workspace.committed),
        trusted=True,
        edited=left_out.edited.within(info.edit_ids),
        left_out=reasons,
        fits={edit_id: Fit(**fit) for edit_id, fit in info.details["fits"].items()},
        columns={"model": config.commit_way},
    )


def _finished_edits(
    ready: Ready, edits_from: str | None, left_out: Collection[int], console: Console, *, fresh: bool
) -> Mapping[str, Location] | None:
    """Files of the single edits by edit id, made first unless they are given; None for a way that uses none."""
    if not way_of(ready.config).uses_edits:
        return None
    if edits_from is None:
        config = _single(ready, left_out)
        if config is None:
            return {}
        single = Workspace.of(config.out).out
        say(console, f"Single edits first, in {single}; these scores are of each edit alone, not of the model:")
        workspace = run(config, console, fresh=fresh).workspace
    else:
        workspace = Workspace.of(edits_from)
    edited = rows.read_rows(rows.parts(workspace), ("edit_id", "status"), statuses=(rows.EDITED,))
    files = {row["edit_id"]: workspace.edit(row["edit_id"]) for row in edited}
    _check_same_records(ready, files)
    return files


def _single(ready: Ready, left_out: Collection[int]) -> RunConfig | None:
    """The run of single edits; of a changed or extended model, of the records that need one. None: no record does."""
    config, out = ready.config, below(ready.config.out, SINGLE)
    tracking = replace(config.tracking, enabled=False)
    single = replace(config, commit=None, out=out, keep_edits=True, tracking=tracking)
    if not _have_own_file(config):
        return single
    needed = [
        {**record.fields, "edit_id": record.edit_id, "task": record.task}
        for record in _to_edit(config, ready.workspace, left_out)
    ]
    if not needed:
        return None
    file, sources = ready.workspace.out / SINGLE_RECORDS, ready.sources
    text = "".join(json.dumps(fields) + "\n" for fields in needed)
    # An equal file keeps its time, by which the run of single edits knows its input when it goes on.
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    data = replace(
        config.data, path=below(config.out, file.name), limit=None, pool=sources.pool, image_root=sources.image_root,
        rephrase_root=sources.rephrase_root, pool_image_root=sources.pool_image_root,
        pool_rephrase_root=sources.pool_rephrase_root,
    )  # fmt: skip
    return replace(single, data=data)


def _have_own_file(config: RunConfig) -> bool:
    """Whether the records of the single edits are written to a file of their own: they are not those of `data.path`."""
    assert config.commit is not None
    return _start(config) is not None or bool(config.commit.settings.add)


def _to_edit(config: RunConfig, workspace: Workspace, left_out: Collection[int]) -> Iterator[RawRecord]:
    """Staged records that need a single edit: they go into the model, and are not in the one that is changed."""
    start = _start(config)
    known = set() if start is None else set(read_committed_info(start.committed).edit_ids)
    for record in staging.usable_records(workspace.records):
        if record.index not in left_out and record.edit_id not in known:
            yield record


def _check_same_records(ready: Ready, files: Mapping[str, Location]) -> None:
    """Raises InputError if a finished edit is of other weights or another question or answer than the record."""
    model = ready.config.backbone
    found = fingerprint(model.family, model.checkpoint, dtype=model.dtype)
    for record in staging.usable_records(ready.workspace.records):
        if record.edit_id not in files:
            continue
        info = read_info(files[record.edit_id])
        if info.fingerprint != comparable(found, info.fingerprint):
            raise InputError(
                f"--from: the edit {record.edit_id} there was made {mismatch(info.fingerprint, found)}. Give a run of "
                "this model."
            )
        if (info.prompt, info.target) != (record.fields["src"], record.fields["alt"]):
            raise InputError(
                f"--from: the edit {record.edit_id} there answers {info.prompt!r} with {info.target!r}, the record "
                f"answers {record.fields['src']!r} with {record.fields['alt']!r}. Give the run of these records."
            )


def _make(
    ready: Ready,
    left_out: frozenset[int],
    edits: Mapping[str, Location] | None,
    start: Workspace | None,
    console: Console,
) -> None:
    """Makes the model and writes it, or goes on with both.

    Args:
        left_out, edits: Fields of `CommitJob` of the same names.
        start: Folder of the run whose model is changed.
    """
    from pipeline.workers import engine, moments

    started = time.monotonic()
    workspace, config = ready.workspace, ready.config
    num_groups = groups_of_model(ready)
    if not workspace.committed.exists() or workspace.model.exists():
        for folder in workspace.written_models:
            folder.delete_folder()
    with ExitStack() as stack:
        connected = ray_session.connected(
            config.pipeline, config.backbone, num_groups, console, TRAINED_GROUPS_PER_WORKER
        )
        plan = stack.enter_context(connected)
        # Again, since Ray has installed a signal handler that exits the process at once.
        stack.enter_context(terminate_as_interrupt())
        num_workers = _num_workers(ready, plan, len(left_out))
        device = f"{counted(num_workers, 'worker')} on {plan.device}"
        say(
            console,
            f"Making one model of {counted(ready.staged.num_usable, 'record')} ({config.commit_way}, {device}).",
        )
        steps = stack.enter_context(Steps(console))

        def show(progress: Mapping[str, Any]) -> None:
            steps.observe(progress["doing"], progress["number"], progress["total"], progress["figures"])

        job = job_of(ready, plan)
        shares = () if workspace.committed.exists() else moments.measure(job, plan, start)
        commit_job = CommitJob(job, left_out, edits, None if start is None else start.committed, shares)
        engine.train(commit_job, plan, num_workers, show)
    for file in (workspace.training, workspace.progress, workspace.problem):
        file.delete()
    seconds = (read_json(workspace.run) or {}).get("seconds", 0.0) + time.monotonic() - started
    update(workspace, seconds=seconds, **{_IS_WRITTEN: True})


def groups_of_model(ready: Ready) -> int:
    """Number of groups that the plan of the model's workers is made for; a way that is not parallel has one worker."""
    return len(ready.staged.usable) if way_of(ready.config).is_parallel else 1


def _num_workers(ready: Ready, plan: Plan, num_left_out: int) -> int:
    """Workers that make the model: each has records, and a GPU of its own if it has one."""
    has_part_of_gpu = 0 < plan.gpus_per_actor < 1
    if has_part_of_gpu or not way_of(ready.config).is_parallel:
        return 1
    return max(1, min(plan.num_actors, ready.staged.num_usable - num_left_out))
