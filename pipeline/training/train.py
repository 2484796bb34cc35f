"""`odedit train`: trains an editor's weights on a file of records, for `editor.checkpoint`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from odedit import editors
from odedit.backbones.base import Backbone
from odedit.data.images import ImageError
from odedit.data.pool import Pool
from odedit.data.records import Check, read_records
from odedit.data.supervision import build_request, check_pool
from odedit.editors.base import Trainable
from odedit.editors.common.weights import save_weights
from odedit.errors import InputError, counted
from odedit.inputs.batch import EditRequest
from odedit.inputs.prompts import find_template
from odedit.objectives import Objective, base, calibrate
from odedit.runtime.addresses import above, below
from odedit.runtime.process import configure_process
from odedit.storage.location import Location, locate
from odedit.training.loop import Figures, Trained, train
from odedit.training.records import EncodedRequests
from odedit.training.state import TrainingState, read_state
from pipeline.config.checkpoints import fitted, with_absolute_checkpoints
from pipeline.config.run import EMBEDDED, DataConfig, RunConfig
from pipeline.config.values import flatten
from pipeline.config.version import code_version
from pipeline.console import say
from pipeline.driver.progress import duration
from pipeline.interrupts import terminate_as_interrupt
from pipeline.run_folder import sources
from pipeline.run_folder.pictures import check_pictures
from pipeline.run_folder.rows import supervision_name
from pipeline.run_folder.sources import Sources, absolute
from pipeline.run_folder.staging import POOL_RECORDS, check_for
from pipeline.run_folder.workspace import check_access, new_local_folder
from pipeline.tracking import connection, runs
from pipeline.workers.asked import with_old_answers
from pipeline.workers.model import load_with_feature_cache, with_checked_store
from pipeline.workers.negatives import negative_pool
from pipeline.workers.plan import machine_cpus, machine_gpus, make_plan
from pipeline.workers.preparer import located

_RECORDS_AT_ONCE = 64
_STEPS_MEASURED = 2
_SECONDS_BETWEEN_LINES = 5.0
_COMPARED = ("backbone", "editor", "objective", "supervision", "training", "seed")
_COMPARED_DATA = ("task", "template", "max_pixels", "max_bytes", "pool")
_SUFFIX = ".safetensors"
_SHOWN = ("rel", "gen", "loc", "lambda")


@dataclass(frozen=True)
class Files:
    """Files of a training.

    Attributes:
        path: Path or address of the weights.
    """

    path: str

    @cached_property
    def weights(self) -> Location:
        return locate(self.path, "--out")

    @property
    def state(self) -> Location:
        """State from which an interrupted training resumes."""
        return self.weights.parent / f"{self.weights.stem}.training{_SUFFIX}"


def run(config: RunConfig, out: Path | str | None, console: Console, *, fresh: bool) -> Location:
    """Trains an editor, or resumes its training; returns the file of the weights.

    Args:
        config: Run whose editor is trained.
        out: Path or address of the weights; None: a file in the parent folder of `config.out`.
        console: Console for progress.
        fresh: Start over if weights or state exist.

    Raises:
        InputError: The editor has no weights to train, the settings or the records are wrong, or `out` holds something
            else.
        TrainingError: The loss is not finite.
        TrackingError: The weights were written, but MLflow could not be written to.
    """
    if not isinstance(editors.find(config.editor.name)(config.editor.settings), Trainable):
        raise InputError(f"editor {config.editor.name!r} has no weights of its own: there is nothing to train.")
    config, notes = fitted(with_checked_store(with_absolute_checkpoints(config)), trains=True)
    editor: Any = editors.find(config.editor.name)(config.editor.settings)
    name = f"{config.editor.name}-{config.objective.name}-{config.backbone.family}.safetensors"
    files = Files(absolute(str(out or below(above(absolute(config.out)), name))))
    if config.tracking.enabled:
        connection.store_uri(config.tracking, files.weights)
    _check_out(files, fresh=fresh)

    for note in (*notes, *_of_other_records(config)):
        say(console, f"Note: {note}")
    plan = make_plan(config.pipeline, config.backbone, machine_cpus(), machine_gpus(), 1)
    configure_process(plan.threads_per_actor, plan.device)
    connection.check(config.tracking, files.weights)
    with new_local_folder(files.weights.parent):
        inputs = _inputs(config, files)
        identity = _identity(config, inputs)
    with terminate_as_interrupt():
        backbone = load_with_feature_cache(
            config.backbone, plan.device, config.pipeline.feature_store, partial(say, console)
        )
        identity["backbone.weights"] = backbone.fingerprint
        if fresh:
            files.state.delete()
        elif files.state.exists():
            before = read_state(files.state, identity)
            say(console, f"{files.state}: finished at step {before.step}." if before.stop_reason
                else f"Resuming {files.state} at step {before.step} of {editor.training.max_steps}.")  # fmt: skip
        trained = _train(config, editor, backbone, inputs, files, identity, console)
        save_weights(
            files.weights, trained.weights, config.editor.name, editor.weight_settings, backbone.fingerprint,
            f"{config.objective.name if editor.trains_with_objective else 'its own loss'}, {supervision_name(config)}",
        )  # fmt: skip
    state = trained.state
    best = f"Best validation loss {state.best_loss:.4f} at step {state.best_step} of {state.step}"
    say(console, f"{best} ({state.stop_reason}).")
    say(console, f"Use it with: editor.name={config.editor.name} editor.checkpoint={files.weights}")
    if config.tracking.enabled:
        with terminate_as_interrupt():
            _log(config, state, files)
    return files.weights


def seconds_per_step(config: RunConfig, out: Path | str) -> float:
    """Time of one step of a training, measured on its first records; writes nothing.

    Args:
        config: Run whose editor is to be trained.
        out: Path or address of the weights.

    Raises:
        InputError: The settings or the records are wrong.
        TrainingError: The loss is not finite.
    """
    quiet = Console(quiet=True)
    config, _ = fitted(with_checked_store(with_absolute_checkpoints(config)), trains=True)
    editor: Any = editors.find(config.editor.name)(config.editor.settings)
    plan = make_plan(config.pipeline, config.backbone, machine_cpus(), machine_gpus(), 1)
    configure_process(plan.threads_per_actor, plan.device)
    records = _inputs(config, Files(absolute(str(out))))["training"]
    backbone = load_with_feature_cache(config.backbone, plan.device, config.pipeline.feature_store, partial(say, quiet))
    encoded, objective = _encoded(
        config, editor, backbone, {"training": records}, quiet, most=editor.training.batch_size
    )
    times: list[float] = []

    def show(state: TrainingState, figures: Figures) -> None:
        times.append(time.monotonic())
        if state.step == _STEPS_MEASURED:  # the first step includes warm-up
            raise _Measured

    with suppress(_Measured):
        train(backbone, editor, objective, encoded["training"], encoded["training"], seed=config.seed, progress=show)
    return times[-1] - times[-2]


class _Measured(Exception):
    """Ends a training after the measured steps."""


def _of_other_records(config: RunConfig) -> Iterator[str]:
    """A note where embedded records train a checkpoint that may not be of the embedded world."""
    for name, path in (("path", config.training.path), ("validation", config.training.validation)):
        if path.partition(":")[0] == EMBEDDED and config.backbone.checkpoint != EMBEDDED:
            yield (
                f"training.{name} is {path!r}, questions about handwritten digits, which suit a model of the embedded "
                f"world only; backbone.checkpoint is {config.backbone.checkpoint!r}."
            )


def _check_out(files: Files, *, fresh: bool) -> None:
    """Raises InputError if the weights would replace a file of another training, or cannot be written."""
    check_access(files.weights.parent, "--out")
    if files.weights.exists() and not files.state.exists() and not fresh:
        raise InputError(f"--out: {files.weights} is there already. Name another file, or add --fresh to replace it.")
    if (files.weights.is_local and files.weights.is_folder()) or not files.weights.name.endswith(_SUFFIX):
        raise InputError(f"--out: got {str(files.weights)!r}, expected a file that ends in .safetensors.")


def _inputs(config: RunConfig, files: Files) -> dict[str, Sources]:
    """Record files of both parts, training and validation. Raises InputError if records or pictures are missing."""
    data = {part: _data(config, part) for part in ("training", "validation")}
    inputs: dict[str, Sources] = {}
    # Files of the user are checked before embedded records are written, which takes a while.
    for part in sorted(data, key=lambda part: data[part].split is not None):
        source = inputs[part] = sources.resolve(data[part], files.path, config.supervision.rephrases)
        source.identity()
        source.reader.check_roots()
        check_pictures(read_records(source.path, task=config.data.task, columns=config.data.columns), source.reader)
    return {part: inputs[part] for part in data}


def _data(config: RunConfig, part: str) -> DataConfig:
    """Section `data` of the training or validation records; locality is drawn from the training records."""
    training = config.training
    path = training.path if part == "training" else training.validation
    is_embedded = path.partition(":")[0] == EMBEDDED
    try:
        return replace(
            config.data,
            path=path,
            image_root=training.image_root or config.data.image_root,
            rephrase_root=training.rephrase_root or config.data.rephrase_root,
            pool=config.data.pool or (None if is_embedded else training.path),
            pictures=None,
        )
    except ValueError as error:
        raise InputError(f"training.{'path' if part == 'training' else 'validation'}: {error}") from error


def _identity(config: RunConfig, inputs: dict[str, Sources]) -> dict[str, Any]:
    """Settings and files that the weights depend on."""
    values = config.to_dict()
    values["editor"].pop("checkpoint", None)
    values["backbone"] = config.backbone.identity
    flat = flatten({name: values[name] for name in _COMPARED})
    flat |= {f"data.{name}": values["data"][name] for name in _COMPARED_DATA}
    for part, files in inputs.items():
        # The identity has no folder: the embedded benchmark is written beside the weights.
        flat |= {f"{part}: {name}": value for name, value in files.identity().items()}
    return flat


def _train(
    config: RunConfig,
    editor: Any,
    backbone: Backbone,
    inputs: dict[str, Sources],
    files: Files,
    identity: dict[str, Any],
    console: Console,
) -> Trained:
    if files.state.exists():
        state = read_state(files.state, identity)
        if state.stop_reason:
            return Trained(state.best, state)
    encoded, objective = _encoded(config, editor, backbone, inputs, console)
    say(console, ", ".join(counted(len(records), f"{part} record") for part, records in encoded.items()) + ".")
    with _Bar(console, "step") as bar:

        def show(state: TrainingState, figures: Figures) -> None:
            shown = {name: figures[name] for name in _SHOWN if name in figures}
            shown |= {"loss": state.losses[-1]} if state.losses else {}
            bar("training", state.step, editor.training.max_steps, shown | {"best validation": state.best_loss})

        return train(
            backbone, editor, objective, encoded["training"], encoded["validation"],
            seed=config.seed, path=files.state, identity=identity, progress=show,
        )  # fmt: skip


def _encoded(
    config: RunConfig,
    editor: Any,
    backbone: Backbone,
    inputs: dict[str, Sources],
    console: Console,
    most: int | None = None,
) -> tuple[dict[str, EncodedRequests], base.Objective | None]:
    """The encoded records of each part, at most `most`, and the objective if the editor trains with it."""
    template = find_template(config.data.template)
    limits = {"training": config.training.limit, "validation": config.training.validation_limit}
    check = check_for(backbone.processor.tokenizer)
    negatives, settings = None, config.objective.settings
    if editor.trains_with_objective:
        negatives = negative_pool(settings, backbone, lambda: _pool(config, inputs["training"], check), editor.sites)
    joined = settings.joins_rephrases and editor.trains_with_objective
    encoded = {
        part: EncodedRequests(backbone, template, editor.sites, negatives=negatives, joined=joined) for part in inputs
    }
    bandwidth = None
    with _Bar(console, "record") as bar:
        for part, records in encoded.items():
            requests = _requests(config, inputs[part], limits[part], part, check, console)
            for chunk in _chunks(islice(requests, most)):
                needs_bandwidth = settings.needs_bandwidth and editor.trains_with_objective
                if part == "training" and bandwidth is None and needs_bandwidth:
                    bandwidth = _bandwidth(config, backbone, chunk)
                records.add(chunk if negatives is None else with_old_answers(backbone, template, chunk))
                bar(part, len(records), limits[part], {})
    return encoded, Objective(settings, bandwidth) if editor.trains_with_objective else None


def _bandwidth(config: RunConfig, backbone: Backbone, requests: Sequence[EditRequest]) -> float:
    try:
        positions = config.objective.settings.calibrated_positions
        return calibrate(backbone, requests, find_template(config.data.template), positions)
    except ValueError as error:
        raise InputError(f"training.path: {error} Use other records, or set objective.sigma2_0.") from error


def _requests(
    config: RunConfig, source: Sources, limit: int | None, part: str, check: Check, console: Console
) -> Iterator[EditRequest]:
    """The usable records as edits with their supervision.

    Raises:
        InputError: No record can be used.
    """
    source.reader.check_roots()
    pool = _pool(config, source, check)
    records = partial(
        read_records, source.path, task=config.data.task, limit=limit, check=check, columns=config.data.columns
    )
    check_pool((record for record in records() if not record.problem), source.reader, config.supervision, pool)
    num_used, problems = 0, []
    for record in records():
        if record.problem:
            problems.append(located(record, record.problem))
            continue
        try:
            request = build_request(record, source.reader, config.supervision, pool)
        except (ImageError, InputError) as error:
            problems.append(located(record, str(error)))
            continue
        num_used += 1
        yield request
    if problems:
        say(console, f"{part}: {counted(len(problems), 'record')} skipped; first: {problems[0]}")
    if not num_used:
        raise InputError(f"training.{'path' if part == 'training' else part}: no record can be used; see above.")


def _pool(config: RunConfig, source: Sources, check: Check) -> Pool:
    assert source.pool is not None
    seed = config.supervision.seed
    return Pool.sample(
        source.pool, source.pool_reader, size=POOL_RECORDS, seed=seed, task=config.data.task, check=check,
        columns=config.data.columns,
    )  # fmt: skip


def _chunks(requests: Iterator[EditRequest]) -> Iterator[Sequence[EditRequest]]:
    while chunk := list(islice(requests, _RECORDS_AT_ONCE)):
        yield chunk


class _Bar:
    """A progress bar on a terminal; elsewhere a line every few seconds."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit, self._last = console, unit, 0.0
        self._begun: dict[str, tuple[float, int]] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _left(self, name: str, done: int, total: int | None) -> str:
        """Upper bound on the time left, from the speed since the first call."""
        begun, before = self._begun[name]
        if not total or done in (before, total):
            return ""
        return f"{duration((time.monotonic() - begun) / (done - before) * (total - done))} left at most"

    def __call__(self, name: str, done: int, total: int | None, figures: Figures) -> None:
        self._begun.setdefault(name, (time.monotonic(), done))
        text = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, figures=text)
        self._progress.update(self._tasks[name], completed=done, figures=text)
        if not self._console.is_terminal and (done == total or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES):
            self._last = time.monotonic()
            of = f" of {total}" if total else ""
            line = ", ".join(
                part for part in (f"{name}: {self._unit} {done}{of}", text, self._left(name, done, total)) if part
            )
            say(self._console, line)


def _log(config: RunConfig, state: TrainingState, files: Files) -> None:
    curves = {
        "training_loss": [(step, loss) for step, loss in enumerate(state.losses, start=1)],
        "validation_loss": list(state.looks),
        "best_validation_loss": [(state.best_step, state.best_loss)],
    }
    notes = {"odedit.weights": str(files.weights), "odedit.stop_reason": state.stop_reason}
    runs.log_training(config, code_version(), curves, files.weights, notes)
