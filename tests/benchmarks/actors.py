"""Speed of the pipeline with one and two workers, relative to a bare loop.

    python -m tests.benchmarks.actors [--edits 288] [--out DIR]

Model: the embedded BLIP-2; WISE under ODEdit, the same number of steps for every edit, one thread per worker. The bare
loop over prepared requests runs before and after the pipeline, because the load of a shared machine changes, and twice
at once, which is the limit of two cores. The pipeline runs as `odedit edit`. Its speed is that of the steady state:
from the end of the first quarter, when all workers have started, to the last group but one of each worker.
"""

from __future__ import annotations

import argparse
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from odedit import world
from tests.benchmarks.scale import bare_loop, in_own_process, measure
from tests.benchmarks.tables import bars, show

BATCH, STEPS = 8, 20


def settings(out: Path, data: dict[str, Any], edits: int, actors: int) -> dict[str, Any]:
    return {
        "data": data | {"limit": edits},
        "editor": {"name": "wise", "site": "layers.2.ffn.in"},
        "objective": {"name": "odedit", "sigma2_0": 100.0},
        "stopping": {"max_steps": STEPS, "worst_token_nll": 1e-9},
        "pipeline": {
            "actors": actors, "preparers": 1, "batch_size": BATCH, "device": "cpu", "threads_per_actor": 1,
        },
        "tracking": {"enabled": False},
        "out": str(out),
    }  # fmt: skip


def loop_rate(values: dict[str, Any]) -> float:
    """Edits per second of the bare loop, without the first group."""
    _, groups, work = bare_loop(values)
    work(groups[0].requests)
    begun = time.perf_counter()
    for group in groups[1:]:
        work(group.requests)
    return sum(len(group.requests) for group in groups[1:]) / (time.perf_counter() - begun)


def steady_rate(results: Path, actors: int) -> float:
    """Edits per second, from the modification times of the groups' result files."""
    times = sorted(path.stat().st_mtime for path in results.glob("part-*.parquet"))
    first, last = len(times) // 4, len(times) - 1 - actors
    return BATCH * (last - first) / (times[last] - times[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=288)
    parser.add_argument("--out", type=Path, default=Path("bench/actors"))
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = world.build(out / "world")
    data = {
        "path": str(files["evaluation"]), "pool": str(files["train"]),
        "image_root": str(out / "world" / "images"), "rephrase_root": str(out / "world" / "images_rephrase"),
    }  # fmt: skip
    console = Console(stderr=True)

    def loop(name: str) -> float:
        return float(in_own_process(loop_rate, settings(out / name, data, arguments.edits, 1)))

    def loops(count: int) -> float:
        with ThreadPoolExecutor(count) as side_by_side:
            return sum(side_by_side.map(loop, [f"{number} of {count}" for number in range(count)]))

    def run(actors: int) -> float:
        folder = out / f"{actors}"
        folder.mkdir()
        measure(folder, settings(folder / "out", data, arguments.edits, actors), arguments.edits, console)
        return steady_rate(folder / "out" / "results", actors)

    before = loop("before")
    one, two = run(1), run(2)
    both, after = loops(2), loop("after")
    bare = (before + after) / 2
    rows = [
        ["bare loop, before", before, before / bare, ""],
        ["bare loop, after", after, after / bare, ""],
        ["two bare loops at once", both, both / bare, ""],
        ["pipeline, 1 actor", one, one / bare, 1.0],
        ["pipeline, 2 actors", two, two / bare, two / one],
    ]
    show(
        f"Edits per second, {arguments.edits} edits", ["", "edits/s", "of the loop", "of 1 actor"], rows, out, "actors"
    )
    bars("Edits per second", [row[0] for row in rows], {"edits/s": [row[1] for row in rows]}, "1/s", out / "actors.png")


if __name__ == "__main__":
    main()
