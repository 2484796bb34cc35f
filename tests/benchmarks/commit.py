"""What committing records to one model costs: CPU time and memory per record for more and more records, and the gain
of a second worker.

    python -m tests.benchmarks.commit --sizes 100,500,2000 --out bench
    python -m tests.benchmarks.commit --sizes 100,300,1000 --way bulk

The embedded BLIP-2 takes records with pictures of noise. Joint training reads every record `looks` times, so a flat
cost per record is a flat line; the two sides of its second table take turns. `bulk` makes the vectors and solves.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from odedit import Stopping, edit, editors, encode_requests, load_backbone, objectives, stack_params
from odedit.inputs.batch import EditParams, EditRequest
from odedit.ways.base import Task
from odedit.ways.bulk import Bulk, BulkConfig
from odedit.ways.joint import Joint, JointConfig
from tests.support.requests import TEMPLATE, make_request

LOOKS = 2
_EDITS_AT_ONCE = 24
_POOL = range(100_000, 100_032)


class Lazy(Sequence[EditRequest]):
    """Requests that are made when they are read, as the workers' are."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return make_request(1_000 * self._numbers[index])


def run(numbers: Sequence[int], steps: int) -> dict[str, float]:
    """Commits these records; CPU seconds, wall seconds and peak bytes of this process."""
    torch.set_num_threads(1)
    settings = dict(Joint.defaults["editor"])
    config = JointConfig(steps=steps, copies=2, candidates=8, check_every=10_000)
    task = Task(
        backbone=load_backbone("blip2", "embedded"),
        template=TEMPLATE,
        editor=editors.load_editor(settings.pop("name"), settings),
        objective=objectives.Objective(objectives.ObjectiveConfig("contrast")),
        requests=Lazy(numbers),
        pool=[make_request(number) for number in _POOL],
    )
    cpu, wall = time.process_time(), time.monotonic()
    trained = wall
    for step in Joint(config).commit(task):
        if step.doing != "training":
            trained = time.monotonic()
    return _figures(cpu, wall) | {"training_s": time.monotonic() - trained}


def _figures(cpu: float, wall: float) -> dict[str, float]:
    """CPU seconds and wall seconds since these times, and peak bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall, "peak_bytes": float(peak)}


def run_bulk(numbers: Sequence[int], steps: int) -> dict[str, float]:
    """Makes the vectors of these records, of `steps` steps each, and writes them; figures as of `run`."""
    torch.set_num_threads(1)
    backbone, requests, editor = load_backbone("blip2", "embedded"), Lazy(numbers), editors.load_editor("residual")
    objective = objectives.Objective(objectives.ObjectiveConfig("rephrase"))
    cpu, wall = time.process_time(), time.monotonic()
    vectors: list[EditParams] = []
    for start in range(0, len(requests), _EDITS_AT_ONCE):
        part = [requests[number] for number in range(start, min(start + _EDITS_AT_ONCE, len(requests)))]
        batch, _ = encode_requests(backbone, part, TEMPLATE, editor.sites, joined=True)
        vectors += [result.params for result in edit(backbone, editor, objective, batch, Stopping(steps))]
    made = time.monotonic()
    pool = [make_request(number) for number in _POOL]
    task = Task(backbone, TEMPLATE, editor, objective, requests, pool, edits=stack_params(vectors))
    for _ in Bulk(BulkConfig(copies=2, candidates=8)).commit(task):
        pass
    return _figures(cpu, wall) | {"vectors_s": made - wall}


def _bulk_apart(queue: Any, numbers: Sequence[int], steps: int) -> None:
    queue.put(run_bulk(numbers, steps))


def measured_bulk(count: int, steps: int) -> dict[str, float]:
    """Figures of `run_bulk` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_bulk_apart, args=(queue, range(count), steps))
    process.start()
    figures: dict[str, float] = queue.get()
    process.join()
    return figures


def _apart(queue: Any, numbers: Sequence[int], steps: int, rank: int, count: int, address: str) -> None:
    if count > 1:
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    queue.put((rank, run(numbers[rank::count], steps)))
    if count > 1:
        distributed.destroy_process_group()


def measured(count: int, steps: int, workers: int = 1) -> dict[str, float]:
    """The first worker's figures, in processes of their own: peak memory belongs to a process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (queue, range(count), steps)
        address = f"file://{folder}/rendezvous"
        processes = [
            context.Process(target=_apart, args=(*arguments, rank, workers, address)) for rank in range(workers)
        ]
        for process in processes:
            process.start()
        figures = dict(queue.get() for _ in processes)
        for process in processes:
            process.join()
    return figures[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100,500,2000")
    parser.add_argument("--steps", type=int, default=30, help="Steps of the comparison of one worker and two.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=("joint", "bulk"), default="joint")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    rows: list[dict[str, float]] = []
    print("| records | CPU ms per record | KiB per further record | steps |\n|--:|--:|--:|--:|")
    for size in sizes:
        is_bulk = options.way == "bulk"
        steps = options.steps if is_bulk else math.ceil(LOOKS * size / JointConfig().records)
        figures = measured_bulk(size, steps) if is_bulk else measured(size, steps)
        row = {"records": size, "cpu_ms": 1e3 * figures["cpu_s"] / size, "steps": steps, **figures}
        further = ""
        if rows:
            grown = row["peak_bytes"] - rows[-1]["peak_bytes"]
            row["further_kib"] = grown / (size - rows[-1]["records"]) / 1024
            further = f"{row['further_kib']:.0f}"
        rows.append(row)
        print(f"| {size} | {row['cpu_ms']:.0f} | {further} | {steps} |", flush=True)
    ratios = []
    for _ in range(0 if options.way == "bulk" else options.rounds):
        one, two = (measured(96, options.steps, workers)["training_s"] for workers in (1, 2))
        ratios.append(one / two)
    if ratios:
        print(
            f"\nTraining with two workers: {', '.join(f'{ratio:.2f}' for ratio in ratios)} times as fast as with one."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"commit-{options.way}.json").write_text(
        json.dumps({"sizes": rows, "two_workers": ratios}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
