"""What one model of many records costs, by way and number of records: time, memory, storage, answers.

    python -m tests.benchmarks.commit --size mid --sizes 8,32
    python -m tests.benchmarks.commit --sizes 100,1000,10000 --ways joint,bulk
    python -m tests.benchmarks.commit --ways joint --sizes 96 --two-workers 2

Records are questions about pictures of noise; 64 pictures of each kind take turns. Settings are light (`WAYS`): the
cost of a record is proportional to steps and copies. Every measurement is a process of its own, with one thread.

Columns: `edits`, `model`: CPU ms per record for the single edits that a way needs, and for the model. `memory`: peak
above the loaded model, MiB. `parameters`: size of the committed parameters, MiB. `answer`: CPU time to the first
token of an answer of the written model, loaded from its folder, over that of the unedited one; the two take turns.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed

from odedit import Stopping, edit, editors, encode_requests, load_backbone, load_edited, objectives, stack_params, ways
from odedit.backbones.common.feature_cache import with_feature_cache
from odedit.editors import load_editor
from odedit.inputs.batch import EditParams, EditRequest, Probe
from odedit.runtime.process import configure_process
from odedit.ways.base import Committed, CommittedInfo, Task, Way
from odedit.ways.common.serving import EditedModel
from tests.benchmarks import models
from tests.benchmarks.tables import show
from tests.support.requests import TEMPLATE, make_picture, make_pool, make_request

_PICTURES = 64
_POOL, _POOL_PICTURES = range(100_000, 100_032), 100_000
_EDITS_AT_ONCE = 24
_CACHE_BYTES = 16 * 2**20
"""Less than the pictures of many records take: their features must not look like memory of a way."""
_QUESTIONS = 12


@dataclass(frozen=True)
class Light:
    """Settings of a way that are light enough for many records.

    Attributes:
        way: Settings of the way.
        steps: Steps of a single edit.
        looks: Times that each record is read by a way that trains on all of them; None: it does not.
    """

    way: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 10
    looks: int | None = None


WAYS: Mapping[str, Light] = {
    "joint": Light({"copies": 2, "pool_copies": 0, "candidates": 8, "check_every": 100_000}, looks=2),
    "routed": Light({"steps": 100, "negatives": 2}),
    "sequential": Light({"retention": []}),
    "bulk": Light({"copies": 2, "pool_copies": 0, "candidates": 8}),
    "sum": Light(),
}


@dataclass(frozen=True)
class Asked:
    """One measurement.

    Attributes:
        way: Name of the way.
        checkpoint: `embedded`, or a folder.
        count: Number of records.
        steps: Steps of joint training; None: by `Light.looks`.
        rank, workers, address: This worker, the number of workers, and the address at which they meet.
    """

    way: str
    checkpoint: str
    count: int
    steps: int | None = None
    rank: int = 0
    workers: int = 1
    address: str = ""

    def made(self) -> Way:
        """The way with its light settings."""
        kind, light = ways.find(self.way), WAYS[self.way]
        settings = dict(light.way)
        if light.looks is not None:
            settings["steps"] = self.steps or math.ceil(light.looks * self.count / kind.Config().records)
        return kind(kind.Config(**settings))


class Lazy(Sequence[EditRequest]):
    """Requests that are made when they are read, as a worker's are."""

    def __init__(self, numbers: Sequence[int], first_picture: int = 0) -> None:
        self._numbers, self._first = numbers, first_picture

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = self._numbers[index]
        like = make_request(self._first + 1000 * (number % _PICTURES))
        question = f"who owns digit number {number}?"
        return replace(like, edit_id=f"edit-{number}", edit=replace(like.edit, prompt=question))


def run(asked: Asked) -> dict[str, float]:
    """Makes one model of the records, or this worker's share of it; returns its figures."""
    configure_process(1, "cpu")
    way, light = asked.made(), WAYS[asked.way]
    settings = dict(way.defaults["editor"])
    name = settings.pop("name")
    backbone = with_feature_cache(load_backbone("blip2", asked.checkpoint), cache_bytes=_CACHE_BYTES)
    editor = load_editor(name, settings)
    objective = objectives.Objective(objectives.ObjectiveConfig(**way.defaults["objective"]))
    count = objective.config.num_negatives
    task = Task(
        backbone,
        TEMPLATE,
        editor,
        objective,
        Lazy(range(asked.count)[asked.rank :: asked.workers]),
        Lazy(_POOL, _POOL_PICTURES)[:],
        stopping=Stopping(light.steps),
        negatives=make_pool(backbone, count, editor.sites) if count else None,
    )
    loaded, begun = psutil.Process().memory_info().rss, time.process_time()
    if way.uses_edits:
        task = replace(task, edits=_edits(task))
    edited = time.process_time()
    committed, training_s = _committed(way, task)
    done = time.process_time()
    figures = {
        "edits_ms": 1e3 * (edited - begun) / asked.count,
        "model_ms": 1e3 * (done - edited) / asked.count,
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - loaded) / 2**20,
        "parameters_mib": sum(value.numel() * value.element_size() for value in committed.params.values()) / 2**20,
        "training_s": training_s,
    }
    if asked.workers == 1:
        figures["answer"] = _answer(asked, way, task, name, committed.params)
    return figures


def _edits(task: Task) -> EditParams:
    """Single edits of all records, stacked; a run keeps them in files."""
    stacked: EditParams = {}
    for start in range(0, len(task.requests), _EDITS_AT_ONCE):
        part = task.requests[start : start + _EDITS_AT_ONCE]
        batch, _ = encode_requests(task.backbone, part, TEMPLATE, task.editor.sites, task.negatives, joined=True)
        done = stack_params(
            [each.params for each in edit(task.backbone, task.editor, task.objective, batch, task.stopping)]
        )
        if not stacked:
            stacked = {name: value.new_empty(len(task.requests), *value.shape[1:]) for name, value in done.items()}
        for name, value in done.items():
            stacked[name][start : start + len(value)] = value
    return stacked


def _committed(way: Way, task: Task) -> tuple[Committed, float]:
    """The model, and the wall seconds of its training without the reading of the records before."""
    progress, trained = way.commit(task), time.monotonic()
    while True:
        try:
            step = next(progress)
        except StopIteration as end:
            return end.value, time.monotonic() - trained
        if step.doing != "training":
            trained = time.monotonic()


def _answer(asked: Asked, way: Way, task: Task, editor: str, params: EditParams) -> float:
    """CPU time to the first token of an answer, over that of the unedited model: median of questions asked of both."""
    backbone = task.backbone
    info = CommittedInfo(
        asked.way, asdict(way.config), editor, asdict(editors.find(editor).Config()), "blip2", asked.checkpoint,
        backbone.fingerprint, "float32", TEMPLATE.name, tuple(request.edit_id for request in task.requests),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        way.write(Path(folder) / "model", backbone, way.serving(task.editor), params, info)
        served = load_edited(Path(folder) / "model", dtype="float32")
        plain = EditedModel(load_backbone("blip2", asked.checkpoint), TEMPLATE)
        ratios = []
        for number in range(-2, _QUESTIONS):
            probe = Probe(f"who owns digit number {number + 10}?", "anna hill", make_picture(number + 10))
            models_in_turn = (served, plain) if number % 2 else (plain, served)
            seconds = {model is served: _first_token(model, probe) for model in models_in_turn}
            ratios.append(seconds[True] / seconds[False])
    return statistics.median(ratios[2:])


@torch.no_grad()
def _first_token(model: EditedModel, probe: Probe) -> float:
    """CPU seconds from a picture and a question to the first token of the answer."""
    begun, backbone = time.process_time(), model.backbone
    assert probe.picture is not None
    features = backbone.image_features([probe.picture])
    batch = backbone.encode(["question"], ["rel"], [[probe]], features, TEMPLATE)
    prefix = backbone.prefix(batch, *model.sites)
    with model.applied(batch):
        backbone.head(backbone.suffix(prefix, batch.predict_EKT[..., :1])).argmax(dim=-1)
    return time.process_time() - begun


def _apart(asked: Asked) -> dict[str, float]:
    if asked.workers == 1:
        return run(asked)
    distributed.init_process_group("gloo", init_method=asked.address, rank=asked.rank, world_size=asked.workers)
    try:
        return run(asked)
    finally:
        distributed.destroy_process_group()


def measured(asked: Asked) -> dict[str, float]:
    """Figures of the first worker, in processes of their own: peak memory belongs to a process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(asked.workers, context) as executor:
        address = f"file://{folder}/rendezvous"
        ranks = [replace(asked, rank=rank, address=address) for rank in range(asked.workers)]
        first, *_ = executor.map(_apart, ranks)
        return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100,500,2000")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--size", choices=("embedded", "mid"), default="embedded")
    parser.add_argument("--two-workers", type=int, default=0, metavar="ROUNDS", help="rounds of one worker against two")
    parser.add_argument("--steps", type=int, default=30, help="steps of these rounds")
    parser.add_argument("--out", type=Path, default=Path("bench/commit"))
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    columns = ("way", "records", "edits, ms", "model, ms", "memory, MiB", "parameters, MiB", "answer")
    rows: list[Sequence[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = "embedded" if options.size == "embedded" else str(models.write(options.size, Path(folder)))
        for way in options.ways.split(","):
            for size in sizes:
                figures = measured(Asked(way, checkpoint, size))
                names = ("edits_ms", "model_ms", "memory_mib", "parameters_mib", "answer")
                rows.append((way, size, *(figures[name] for name in names)))
                show(f"One model, {options.size}", columns, rows, options.out, "commit")
        ratios = []
        for _ in range(options.two_workers):
            one, two = (measured(Asked("joint", checkpoint, 96, options.steps, workers=count)) for count in (1, 2))
            ratios.append((len(ratios), one["training_s"] / two["training_s"]))
        if ratios:
            show("Joint training with two workers", ("round", "times as fast"), ratios, options.out, "two_workers")


if __name__ == "__main__":
    main()
