"""Trainings of a study: each distinct training once, several at a time in processes of their own.

Processes instead of Ray tasks: trainings write to local paths even if the study's runs use a cluster, and need the
memory of Ray's own processes (0.4 GiB) for nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import queue
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from odedit import editors, objectives
from odedit.backbones import fingerprint
from odedit.data.negatives import NegativePool
from odedit.errors import InputError, counted, one_sentence
from odedit.runtime.addresses import below
from odedit.storage.location import Location, at
from odedit.training import loop
from odedit.training.loop import TrainingError
from odedit.world.facts import WORLD
from pipeline.config.run import EMBEDDED, DataConfig, RunConfig, embedded_split
from pipeline.console import say
from pipeline.driver.progress import duration
from pipeline.interrupts import terminate_as_interrupt
from pipeline.run_folder.sources import absolute, identity_of
from pipeline.tracking.client import TrackingError
from pipeline.training import train
from pipeline.workers.plan import machine_cpus, machine_gpus, make_plan

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Training:
    """A training of one editor.

    Attributes:
        config: Run whose editor is trained.
        path: Path or address of the weights.
        arm: Name of the first arm that uses the weights.
    """

    config: RunConfig
    path: str
    arm: str

    @property
    def name(self) -> str:
        return f"{self.config.editor.name} for {self.arm}"

    @property
    def max_steps(self) -> int:
        """Largest number of steps; validation may end the training earlier."""
        editor: Any = editors.find(self.config.editor.name)(self.config.editor.settings)
        return int(editor.training.max_steps)


def with_weights(
    configs: Sequence[RunConfig], names: Sequence[str], folder: Path | str, console: Console
) -> list[RunConfig]:
    """The runs with `editor.checkpoint` set, for every editor that needs trained weights and has none.

    Weights are keyed by all that they depend on: finished ones are reused, interrupted trainings resumed, and runs of
    the same key share them.

    Args:
        configs: Runs.
        names: Names of the runs, for messages.
        folder: Path or address of the folder of weights.
        console: Console for progress.

    Raises:
        InputError: A training's settings or records are wrong.
        TrainingError: A loss is not finite, or a training's process was ended from outside.
        TrackingError: Weights were written, but MLflow could not be written to.
    """
    trainings = [_training(config, name, absolute(str(folder))) for config, name in zip(configs, names, strict=True)]
    missing: dict[str, Training] = {}
    for training in trainings:
        if training is not None and not at(training.path).exists():
            missing.setdefault(training.path, training)
    run_all(list(missing.values()), console)
    return [
        config if training is None else _with_checkpoint(config, training.path)
        for config, training in zip(configs, trainings, strict=True)
    ]


def _training(config: RunConfig, name: str, folder: str) -> Training | None:
    kind = editors.find(config.editor.name)
    settings = config.editor.settings
    if not hasattr(kind, "native_training_loss") or settings.checkpoint is not None:
        return None
    config = replace(config, data=_training_data(config), backbone=config.backbone.with_family)
    depends_on = {
        "editor": asdict(settings),
        "backbone": config.backbone.identity,
        "training": asdict(config.training),
        "supervision": asdict(config.supervision),
        "objective": config.objective.own_values() if kind.trains_with_objective else None,
        "seed": config.seed,
        "model": fingerprint(config.backbone.family, config.backbone.checkpoint),
        "code": _code(kind, config.objective.name),
        "world": WORLD,
    }
    data = {key: value for key, value in asdict(config.data).items() if value != getattr(DataConfig(), key)}
    if data:
        depends_on["data"] = data
    try:
        files = _files(config)
    except InputError as error:
        raise InputError(f"{config.editor.name} for {name}: {error}") from error
    if files:
        depends_on["files"] = files
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:10]
    out = below(folder, f"{config.editor.name}-{key}")
    path = below(folder, f"{config.editor.name}-{key}.safetensors")
    tracking = replace(config.tracking, run_name=f"train {config.editor.name} for {name}")
    return Training(replace(config, tracking=tracking, out=out), path, name)


def _code(kind: Any, objective: str) -> str:
    """Hash of the source files that weights depend on, so that those of another version are not reused."""
    files = [inspect.getfile(kind), inspect.getfile(loop)]
    if kind.trains_with_objective:
        shipped = sorted(str(path) for path in Path(objectives.__path__[0]).rglob("*.py"))
        files += [*shipped, inspect.getfile(objectives.find(objective)), inspect.getfile(NegativePool)]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:10]


def _training_data(config: RunConfig) -> DataConfig:
    """The run's records without those that are edited, so that studies of other records share the weights."""
    data = replace(config.data, path=DataConfig().path, limit=None)
    if config.training.path.partition(":")[0] == EMBEDDED:
        data = replace(data, image_root=None, rephrase_root=None, pool=None)
    return data


def _files(config: RunConfig) -> dict[str, str]:
    """Path, size and modification time of the files that are read, without the embedded records."""
    training = config.training
    paths = {"training.path": training.path, "training.validation": training.validation, "data.pool": config.data.pool}
    return {
        name: identity_of(absolute(path), name)
        for name, path in paths.items()
        if path is not None and embedded_split(path)[0] is None
    }


def _with_checkpoint(config: RunConfig, path: str) -> RunConfig:
    settings = replace(config.editor.settings, checkpoint=path)
    return replace(config, editor=replace(config.editor, settings=settings))


def run_all(trainings: Sequence[Training], console: Console) -> None:
    """Runs the trainings: one after the other, or several at a time in processes of their own."""
    if not trainings:
        return
    num_processes = min(len(trainings), *(_room(training.config, len(trainings)) for training in trainings))
    folder = at(trainings[0].path).parent
    folder.make_folder()
    _announce(trainings, num_processes, folder, console)
    if num_processes > 1:
        _run_together(trainings, num_processes, console)
        return
    for training in trainings:
        with _named(training):
            train.run(training.config, training.path, console, fresh=False)


def _announce(trainings: Sequence[Training], num_processes: int, folder: Location, console: Console) -> None:
    """Prints the trainings and their time, from a measured step of each."""
    verb = "is" if len(trainings) == 1 else "are"
    say(
        console,
        f"First {counted(len(trainings), 'editor')} {verb} trained, {num_processes} at a time. Training takes the same "
        f"time for a small draw. Weights are kept in {folder} and serve other studies.",
    )
    seconds = []
    for training in trainings:
        with _named(training):
            step = train.seconds_per_step(training.config, training.path)
        seconds.append(step * training.max_steps)
        steps = f"at most {counted(training.max_steps, 'step')} of about {step:.2g} s"
        say(console, f"Training {training.name}: {steps}, {duration(seconds[-1])} without validation.")
    if len(trainings) > 1:
        total = max(*seconds, sum(seconds) / num_processes)
        say(console, f"All trainings together: at most about {duration(total)}.")


def _room(config: RunConfig, count: int) -> int:
    """Number of trainings that run at once: one on a GPU, on CPUs one per `threads_per_actor` cores."""
    plan = make_plan(config.pipeline, config.backbone, machine_cpus(), machine_gpus(), count)
    return 1 if plan.device != "cpu" else max(1, machine_cpus() // plan.threads_per_actor)


def _run_together(trainings: Sequence[Training], num_processes: int, console: Console) -> None:
    context = multiprocessing.get_context("spawn")  # a forked process would inherit locked locks of threads
    lines, stopping = context.Queue(), context.Event()
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(num_processes, context, _begin, (lines, stopping))
    try:
        running = {pool.submit(_train, training): training for training in trainings}
        while running:
            done, _ = wait(running, timeout=_SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            _show(lines, console)
            for future in done:
                with _named(running.pop(future)):
                    future.result()
    except BaseException:
        # Trainings save their state on SIGTERM. Processes between two trainings ignore it, and see the event instead.
        stopping.set()
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _show(lines, console)


def _show(lines: Any, console: Console) -> None:
    """Prints the lines that the processes have sent."""
    with suppress(queue.Empty):
        while True:
            say(console, lines.get_nowait())


_lines: Any = None
_stopping: Any = None


def _begin(lines: Any, stopping: Any) -> None:
    """Initializes a process, which its parent alone ends: by SIGTERM during a training."""
    global _lines, _stopping
    _lines, _stopping = lines, stopping
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _train(training: Training) -> None:
    with terminate_as_interrupt():
        if not _stopping.is_set():
            config = replace(training.config, pipeline=replace(training.config.pipeline, device="cpu"))
            console = Console(file=_Lines(training.name, _lines), force_terminal=False)  # type: ignore[arg-type]
            train.run(config, training.path, console, fresh=False)


class _Lines:
    """A text stream that sends each line, with a name before it, to a queue."""

    def __init__(self, name: str, lines: Any) -> None:
        self._name, self._lines, self._begun = name, lines, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._lines.put(f"{self._name}: {line}")
        return len(text)

    def flush(self) -> None:
        """Does nothing: only unfinished lines are buffered."""


@contextmanager
def _named(training: Training) -> Iterator[None]:
    """Puts the training's name before the messages of errors."""
    try:
        yield
    except (InputError, TrainingError, TrackingError) as error:
        raise type(error)(f"{training.name}: {error}") from error
    except BrokenProcessPool as error:
        raise TrainingError(
            f"{training.name}: its process was ended from outside, for want of memory perhaps. "
            "The same command goes on."
        ) from error
    except Exception as error:
        raise TrainingError(f"{training.name}: {one_sentence(error)}") from error
