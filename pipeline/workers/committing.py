"""The workers of `odedit commit`: they make one model of all records, with Ray Train, and write it.

Each worker has a share of the records. The first one writes the progress, the parameters and the model. Work that was
interrupted goes on from the stored state; parameters that exist are not made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from odedit import editors, objectives, ways
from odedit.backbones import Backbone, encode_requests
from odedit.data.images import ImageError
from odedit.data.negatives import NegativePool
from odedit.data.pool import Pool
from odedit.data.records import RawRecord
from odedit.data.supervision import build_request
from odedit.editing.adapters import is_adapter, write_adapter
from odedit.editing.files import load_edit
from odedit.editors.base import Measuring
from odedit.errors import InputError, listed, one_sentence
from odedit.inputs.batch import EditParams, EditRequest, stack_params
from odedit.inputs.prompts import find_template
from odedit.runtime import parallel
from odedit.runtime.process import configure_process
from odedit.storage.location import Location, copy_folder
from odedit.ways.base import Committed, Step, Task, Way
from odedit.ways.common.activations import added_up
from odedit.ways.common.files import CommittedInfo, load_committed, load_with_carried, save_committed
from pipeline.run_folder import staging
from pipeline.run_folder.committed import is_plain
from pipeline.run_folder.workspace import Workspace, read_json, write_json, write_rows
from pipeline.workers.asked import with_old_answers
from pipeline.workers.calibration import Calibration
from pipeline.workers.model import worker_backbone
from pipeline.workers.negatives import negative_pool
from pipeline.workers.plan import Job
from pipeline.workers.preparer import write_note, write_traceback
from pipeline.workers.request_cache import RequestCache

KEPT_BYTES = 2**30
"""Memory of a worker for the records' pictures; others are read again."""
_PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class CommitJob:
    """Inputs of the workers that make one model.

    Attributes:
        job: The run.
        left_out: Positions of the records that do not go into the model.
        edits: Files of finished single edits by edit id, for a way that uses them.
        start: File of the committed model that is changed; None: there is none.
        moments: Files of second moments, for a way that reads them; their sum counts.
    """

    job: Job
    left_out: frozenset[int] = frozenset()
    edits: Mapping[str, Location] | None = None
    start: Location | None = None
    moments: Sequence[Location] = ()


def way_of(config: Any) -> Way:
    """The way of a run that commits."""
    choice = config.commit
    way: Way = ways.find(choice.name)(choice.settings)
    return way


def work(config: Mapping[str, CommitJob]) -> None:
    """The function that Ray Train runs on every worker."""
    commit_job = config["commit"]
    job = commit_job.job
    try:
        if job.device == "cuda":
            _use_own_gpu()
        commit(commit_job)
    except InputError as error:
        write_json(job.workspace.problem, {"problem": str(error)})
        # Other workers may wait for this one: Ray Train ends them all if it raises.
        if parallel.count() > 1:
            raise
    except Exception:
        write_traceback(job, f"commit-{parallel.rank()}")
        raise


def commit(commit_job: CommitJob) -> None:
    """Makes the model and writes it, or goes on with both; as one of several workers, with its share of the records.

    Raises:
        InputError: The records or the settings do not allow the model.
    """
    _Worker(commit_job).work()


def _use_own_gpu() -> None:
    """Makes the GPU that Ray Train gives this worker its current device; all workers of a node see all its GPUs."""
    import torch
    from ray.train.torch import get_device

    torch.cuda.set_device(get_device())


class Requests(Sequence[EditRequest]):
    """Edit requests of records, built when they are read; recent ones stay in memory."""

    def __init__(self, records: Sequence[RawRecord], build: Callable[[RawRecord], EditRequest]) -> None:
        self.records, self._build = records, build
        self._cache = RequestCache(KEPT_BYTES)

    def of(self, records: Sequence[RawRecord]) -> Requests:
        """Requests of other records, built alike; those in memory stay there."""
        other = Requests(records, self._build)
        other._cache = self._cache
        return other

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        record = self.records[index]
        request = self._cache.get(record.edit_id)
        if request is None:
            request = self._build(record)
            self._cache.put(record.edit_id, request)
        return request


class _Worker:
    """One worker of the job."""

    def __init__(self, commit_job: CommitJob) -> None:
        self._commit_job, self._job = commit_job, commit_job.job
        config = self._job.config
        configure_process(self._job.num_threads, self._job.device)
        self._config, self._workspace = config, self._job.workspace
        self._way = way_of(config)
        self._editor = editors.find(config.editor.name)(config.editor.settings)
        self._backbone: Backbone = worker_backbone(
            config.backbone, self._job.device, config.pipeline.feature_store, partial(write_note, self._job, "store")
        )
        self._template = find_template(config.data.template)
        self._pool = staging.read_pool(self._workspace, self._job.sources)
        self._negatives: NegativePool | None = None
        self._last_written = 0.0

    def work(self) -> None:
        if not self._workspace.committed.exists():
            self._make()
        if parallel.rank() == 0:
            self._write_model()

    def _make(self) -> None:
        task, problems = self._task()
        steps = self._way.commit(task)
        while True:
            try:
                self._show(next(steps))
            except StopIteration as end:
                committed: Committed = end.value
                break
        reasons = {**problems, **committed.problems}
        ids = [edit_id for edit_id in _ids(task) if edit_id not in reasons]
        parts = parallel.gathered((ids, committed.fits, reasons))
        if parallel.rank() == 0:
            every = tuple(edit_id for part, _, _ in parts for edit_id in part)
            fits = {edit_id: asdict(fit) for _, part, _ in parts for edit_id, fit in part.items()}
            reasons = {edit_id: reason for *_, part in parts for edit_id, reason in part.items()}
            details = {"fits": fits, "problems": reasons, "curves": committed.curves}
            if committed.tables:
                details["tables"] = committed.tables
            info = self._info(every, details)
            save_committed(self._workspace.committed, committed.params, info, committed.carried)

    def _info(self, edit_ids: tuple[str, ...], details: dict[str, Any]) -> CommittedInfo:
        config = self._config
        choice = config.commit
        assert choice is not None
        return CommittedInfo(
            way=choice.name,
            way_config=_of_model(asdict(choice.settings)),
            editor=config.editor.name,
            editor_config=asdict(config.editor.settings),
            family=config.backbone.family,
            checkpoint=config.backbone.checkpoint,
            fingerprint=self._backbone.fingerprint,
            dtype=config.backbone.dtype,
            template=config.data.template,
            edit_ids=edit_ids,
            details=details,
            image_size=config.backbone.image_size,
        )

    def _task(self) -> tuple[Task, dict[str, str]]:
        """The worker's task, and the reason per record that cannot be read."""
        config = self._config
        calibration = Calibration(self._job, self._backbone, self._template)
        if self._way.makes_edits:
            self._prepare_edits(calibration)
        pool = [] if self._pool is None else self._pool_requests(self._pool)
        start, info, start_ids = None, None, frozenset[str]()
        carried: EditParams = {}
        if self._commit_job.start is not None:
            start, info, carried = load_with_carried(self._commit_job.start, self._job.device)
            start_ids = frozenset(info.edit_ids)
        requests, problems = self._requests(lambda record: record.index not in self._commit_job.left_out)
        removed, _ = self._requests(
            lambda record: record.index in self._commit_job.left_out and record.edit_id in start_ids
        )
        edits = None
        if self._commit_job.edits is not None:
            edits, requests, missing = self._finished_edits(requests, start_ids)
            problems |= missing
        objective = objectives.Objective(config.objective.settings, calibration.bandwidth())
        return (
            Task(
                backbone=self._backbone,
                template=self._template,
                editor=self._editor,
                objective=objective,
                requests=requests,
                pool=pool,
                seed=config.seed,
                edits=edits,
                start=start,
                start_ids=() if info is None else info.edit_ids,
                start_details={} if info is None else info.details,
                carried=carried,
                removed=removed,
                state=self._workspace.training,
                moments=added_up(self._commit_job.moments, "cpu"),
                stopping=config.stopping,
                negatives=self._negatives,
            ),
            problems,
        )

    def _prepare_edits(self, calibration: Calibration) -> None:
        """What single edits need before the first one: hard negatives, and the editor's own measurements."""
        settings, sites = self._config.objective.settings, self._editor.sites
        self._negatives = negative_pool(settings, self._backbone, lambda: self._pool, sites)
        if isinstance(self._editor, Measuring):
            unscored = calibration.unscored_requests()
            if unscored:  # else the editor measures the supervision of each edit
                batch, _ = encode_requests(self._backbone, unscored, self._template, sites)
                self._editor = self._editor.measured(self._backbone, batch)

    def _requests(self, is_wanted: Callable[[RawRecord], bool]) -> tuple[Requests, dict[str, str]]:
        """The worker's share of these records, and the reason per record whose pictures cannot be read."""
        config, reader = self._config, self._job.sources.reader
        locality = staging.reads_locality(config)
        every = filter(is_wanted, staging.usable_records(self._workspace.records))
        mine = [record for number, record in enumerate(every) if number % parallel.count() == parallel.rank()]

        def build(record: RawRecord) -> EditRequest:
            request = build_request(record, reader, config.supervision, self._pool, locality=locality)
            if self._negatives is None:
                return request
            return with_old_answers(self._backbone, self._template, [request])[0]

        requests = Requests(mine, build)
        problems: dict[str, str] = {}
        for number, record in enumerate(mine):
            self._show(Step(number, len(mine), doing="reading pictures"))
            try:
                requests[number]
            except (ImageError, InputError) as error:
                problems[record.edit_id] = str(error)
        return requests.of([record for record in mine if record.edit_id not in problems]), problems

    def _pool_requests(self, pool: Pool) -> Requests:
        """The pool's records whose pictures can be read, with a rephrase of each kind and their probes."""
        supervision = replace(self._config.supervision, near_locality=False, rephrases=1)

        def build(record: RawRecord) -> EditRequest:
            return build_request(record, pool.reader, supervision, locality=False)

        requests = Requests(pool.records, build)
        readable = []
        for number, record in enumerate(pool.records):
            self._show(Step(number, len(pool.records), doing="reading the pool"))
            with suppress(ImageError, InputError):
                requests[number]
                readable.append(record)
        return requests.of(readable)

    def _finished_edits(
        self, requests: Requests, start_ids: Collection[str]
    ) -> tuple[EditParams | None, Requests, dict[str, str]]:
        """Parameters of the new edits, the records that have an edit, and the reason per record without."""
        files = self._commit_job.edits or {}
        records = requests.records
        has_edit = {*files, *start_ids}
        kept = [record for record in records if record.edit_id in has_edit]
        missing = {
            record.edit_id: "it has no finished edit; its row in the run of single edits says why."
            for record in records
            if record.edit_id not in has_edit
        }
        if not kept:
            raise InputError(f"none of the records has a finished edit; first without: {listed(list(missing)[:3])}.")
        new = [load_edit(files[record.edit_id])[0] for record in kept if record.edit_id not in start_ids]
        return stack_params(new) if new else None, requests.of(kept), missing

    def _show(self, step: Step) -> None:
        """Writes the progress, at most once a second."""
        now = time.monotonic()
        if parallel.rank() == 0 and (now - self._last_written >= _PROGRESS_EVERY_S or step.number == step.total):
            self._last_written = now
            with suppress(OSError):  # progress is no result
                write_json(self._workspace.progress, asdict(step))

    def _write_model(self) -> None:
        """Writes the folders that people serve."""
        params, info = load_committed(self._workspace.committed, self._job.device)
        editor = self._way.serving(self._editor)
        self._show(Step(1, 1, doing="writing the model"))
        for name, rows in info.details.get("tables", {}).items():
            write_rows(self._workspace.further_table(name), rows)
        _written(self._workspace.model, lambda path: self._way.write(path, self._backbone, editor, params, info))
        if is_plain(self._workspace.model) and is_adapter(editor):
            _written(self._workspace.adapter, lambda path: write_adapter(self._backbone, editor, params, path))


def _of_model(way_config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the way without the files and records that only the run that made the model read."""
    return {name: value for name, value in way_config.items() if name not in ("remove", "add", "start")}


def _ids(task: Task) -> list[str]:
    """Ids of a task's records, whose pictures are not read for this."""
    assert isinstance(task.requests, Requests)
    return [record.edit_id for record in task.requests.records]


def _written(folder: Location, write: Callable[[Path], None]) -> None:
    """Writes a folder, at an address by way of a temporary one. A folder of an interrupted attempt is replaced."""
    folder.delete_folder()
    if folder.is_local:
        write(Path(folder))
        return
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / folder.name
        write(path)
        copy_folder(path, folder, min(child.name for child in path.iterdir() if child.suffix == ".json"))


def show_progress(workspace: Workspace, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Shows the progress that the first worker has written, if any."""
    progress = read_json(workspace.progress)
    if isinstance(progress, dict) and "number" in progress:
        show(progress)


def failure(workspace: Any) -> str:
    """The problem that a worker has left; "" if none."""
    state = read_json(workspace.problem)
    return str(state.get("problem", "")) if isinstance(state, dict) else ""


def explained(error: BaseException) -> str:
    """An error of Ray Train as one sentence."""
    causes = getattr(error, "worker_failures", None) or {}
    first = next(iter(causes.values()), None)
    return one_sentence(first if isinstance(first, BaseException) else error)
