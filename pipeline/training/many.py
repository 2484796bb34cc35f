"""Weights that editors learn before a study's arms can edit: each distinct training once, several at the same time."""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
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
from odedit.training.loop import TrainingError, train
from odedit.world.facts import WORLD
from pipeline.config.run import EMBEDDED, DataConfig, RunConfig
from pipeline.console import say
from pipeline.driver.progress import duration
from pipeline.interrupts import terminate_as_interrupt
from pipeline.run_folder.sources import absolute
from pipeline.tracking.client import TrackingError
from pipeline.training import train as training
from pipeline.workers.plan import machine_cpus, machine_gpus, make_plan

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        config: The run whose editor learns.
        path: File of the weights, or its address.
        arm: The first arm that needs them.
    """

    config: RunConfig
    path: str
    arm: str

    @property
    def name(self) -> str:
        return f"{self.config.editor.name} for {self.arm}"

    @property
    def max_steps(self) -> int:
        """Bound on the steps; validation records may end it earlier."""
        editor: Any = editors.find(self.config.editor.name)(self.config.editor.settings)
        return int(editor.training.max_steps)


def with_weights(
    configs: Sequence[RunConfig], names: Sequence[str], folder: Path | str, console: Console
) -> list[RunConfig]:
    """The runs with trained weights, for every editor that learns before it edits and was given none.

    Weights that are there, or have been begun, are gone on with; runs whose weights depend on the same share them.

    Args:
        names: Of the runs, for people.
        folder: Of the weights; a path or an address.

    Raises:
        InputError: A training's settings or records are wrong.
        TrainingError: A loss is not finite, or a training's process was ended from outside.
        TrackingError: Weights are there, but MLflow could not be written to.
    """
    wanted = [_training(config, name, absolute(str(folder))) for config, name in zip(configs, names, strict=True)]
    missing = {one.path: one for one in reversed(wanted) if one is not None and not at(one.path).exists()}
    run_all([missing[path] for path in reversed(missing)], console)
    return [
        config if one is None else _with_checkpoint(config, one.path)
        for config, one in zip(configs, wanted, strict=True)
    ]


def _training(config: RunConfig, name: str, folder: str) -> Training | None:
    kind = editors.find(config.editor.name)
    settings = config.editor.settings
    if not hasattr(kind, "native_training_loss") or settings.checkpoint is not None:
        return None
    config = replace(config, data=_training_data(config))
    depends_on = {
        "editor": asdict(settings),
        "backbone": asdict(config.backbone),
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
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:10]
    out = below(folder, f"{config.editor.name}-{key}")
    path = below(folder, f"{config.editor.name}-{key}.safetensors")
    tracking = replace(config.tracking, run_name=f"train {config.editor.name} for {name}")
    return Training(replace(config, tracking=tracking, out=out), path, name)


def _code(kind: Any, objective: str) -> str:
    """A hash of what learns and of the loop that trains it: weights of an earlier version are not taken for today's."""
    files = [inspect.getfile(kind), inspect.getfile(train)]
    if kind.trains_with_objective:
        shipped = sorted(str(path) for path in Path(objectives.__path__[0]).rglob("*.py"))
        files += [*shipped, inspect.getfile(objectives.find(objective)), inspect.getfile(NegativePool)]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:10]


def _training_data(config: RunConfig) -> DataConfig:
    """Without the records that are edited, which training does not read: studies of other records share its weights."""
    data = replace(config.data, path=DataConfig().path, limit=None)
    if config.training.path.partition(":")[0] == EMBEDDED:
        data = replace(data, image_root=None, rephrase_root=None, pool=None)
    return data


def _with_checkpoint(config: RunConfig, path: str) -> RunConfig:
    settings = replace(config.editor.settings, checkpoint=path)
    return replace(config, editor=replace(config.editor, settings=settings))


def run_all(wanted: Sequence[Training], console: Console) -> None:
    """Trains everything; in processes of their own if there are several and the machine has room for two."""
    room = min((_room(one.config, len(wanted)) for one in wanted), default=1)
    if wanted:
        folder = at(wanted[0].path).parent
        folder.make_folder()
        _announce(wanted, min(room, len(wanted)), folder, console)
    if min(room, len(wanted)) > 1:
        _run_together(wanted, min(room, len(wanted)), console)
        return
    for one in wanted:
        with _named(one):
            training.run(one.config, one.path, console, fresh=False)


def _announce(wanted: Sequence[Training], num_together: int, folder: Location, console: Console) -> None:
    """Says what is to be trained, and how long that takes by a step that is measured."""
    verb = "is" if len(wanted) == 1 else "are"
    say(
        console,
        f"First {counted(len(wanted), 'editor')} {verb} trained, {num_together} at a time. Training takes the same "
        f"time for a small draw. Weights are kept in {folder} and serve other studies.",
    )
    seconds = []
    for one in wanted:
        with _named(one):
            step = training.seconds_per_step(one.config, one.path)
        seconds.append(step * one.max_steps)
        steps = f"at most {counted(one.max_steps, 'step')} of about {step:.2g} s"
        say(console, f"Training {one.name}: {steps}, {duration(seconds[-1])} without validation.")
    if len(wanted) > 1:
        total = max(*seconds, sum(seconds) / num_together)
        say(console, f"All trainings together: at most about {duration(total)}.")


def _room(config: RunConfig, count: int) -> int:
    """How many trainings fit at once: a GPU takes one, and a large model all cores."""
    plan = make_plan(config.pipeline, config.backbone, machine_cpus(), machine_gpus(), count)
    return 1 if plan.device != "cpu" else max(1, machine_cpus() // plan.threads_per_actor)


def _run_together(wanted: Sequence[Training], num_processes: int, console: Console) -> None:
    context = multiprocessing.get_context("spawn")  # a copy of this process would inherit its threads' locks
    link = _Link(context.Queue(), context.Queue(), context.Event())
    pool = ProcessPoolExecutor(num_processes, context, _begin, (link,))
    try:
        left = {pool.submit(_train, one): one for one in wanted}
        while left:
            done, _ = wait(left, timeout=_SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            link.show(console)
            for future in done:
                with _named(left.pop(future)):
                    future.result()
    except BaseException:
        # Each keeps what it needs to go on, as if it had been interrupted by itself.
        link.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        link.show(console)


@dataclass(frozen=True)
class _Link:
    """What the processes and their parent share."""

    lines: Any
    processes: Any
    stopping: Any

    def show(self, console: Console) -> None:
        """Prints what the processes have said."""
        for line in _taken(self.lines):
            say(console, line)

    def stop(self) -> None:
        """Interrupts the processes; one that has yet to begin a training finds that it need not."""
        self.stopping.set()
        for process in _taken(self.processes):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)


def _taken(messages: Any) -> Iterator[Any]:
    with suppress(queue.Empty):
        while True:
            yield messages.get_nowait()


_link: _Link | None = None


def _begin(link: _Link) -> None:
    """In a new process: only its parent decides when it ends, and tells so with SIGTERM while it trains."""
    global _link
    _link = link
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link.processes.put(os.getpid())


def _train(one: Training) -> None:
    assert _link is not None
    with terminate_as_interrupt():
        if not _link.stopping.is_set():
            config = replace(one.config, pipeline=replace(one.config.pipeline, device="cpu"))
            console = Console(file=_Lines(one.name, _link.lines), force_terminal=False)  # type: ignore[arg-type]
            training.run(config, one.path, console, fresh=False)


class _Lines:
    """A text stream whose whole lines become messages, under the name of what they are about."""

    def __init__(self, name: str, messages: Any) -> None:
        self._name, self._messages, self._begun = name, messages, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._messages.put(f"{self._name}: {line}")
        return len(text)

    def flush(self) -> None:
        """Nothing is held back but a line that has no end yet."""


@contextmanager
def _named(one: Training) -> Iterator[None]:
    """Inside, errors name what was being trained."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{one.name}: {error}") from error
    except TrainingError as error:
        raise TrainingError(f"{one.name}: {error}") from error
    except TrackingError as error:
        raise TrackingError(f"{one.name}: {error}") from error
    except BrokenProcessPool as error:
        raise TrainingError(
            f"{one.name}: its process was ended from outside, for want of memory perhaps. The same command goes on."
        ) from error
    except Exception as error:
        raise TrainingError(f"{one.name}: {one_sentence(error)}") from error
