"""Memory of the driver and of every worker during a long run on two nodes, from the first result to the last.

    python -m tests.benchmarks.soak --records 20000 --out runs/soak

Starts a head and a second node on this machine, with a token, and edits synthetic records with one step of plain
fine-tuning of a small model. Writes `soak.json` and `soak.png`; fails unless every record has exactly one row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from pyarrow import dataset
from rich.console import Console
from rich.table import Table

from tests.benchmarks.scale import BATCH, settings
from tests.support import tiny_models
from tests.support.nodes import Cluster, two_nodes

ROOT = Path(__file__).resolve().parents[2]

_SAMPLE_EVERY_S = 2.0
_SAY_EVERY_S = 30.0
_LEAST_S = 60.0
"""Shortest lifetime of a worker whose growth is reported."""

Samples = dict[str, list[tuple[float, float]]]
"""Seconds since the start and unique set size (USS) in MiB, by process."""


def run(folder: Path, values: dict[str, Any], cluster: Cluster, console: Console) -> tuple[float, Samples]:
    """Seconds of the command, and samples from the first result on."""
    config, log, results = folder / "run.yaml", folder / "log.txt", Path(values["out"]) / "results"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "odedit", "edit", "--config", str(config)]
    samples: Samples = defaultdict(list)
    begun = said = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(cluster.environment), stdout=stream, stderr=stream)
        while process.poll() is None:
            now = time.monotonic()
            if results.is_dir() and next(results.glob("part-*"), None) is not None:
                watched = {"driver": psutil.Process(process.pid)}
                for kind, stage in (("worker", "EditStage"), ("preparer", "PrepareStage")):
                    for worker in cluster.workers(stage):
                        node = "second node" if cluster.is_on_second(worker) else "head"
                        watched[f"{kind} {worker.pid}, {node}"] = worker
                for name, watched_process in watched.items():
                    try:
                        samples[name].append((now - begun, watched_process.memory_full_info().uss / 2**20))
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        continue
            if now - said > _SAY_EVERY_S:
                said = now
                last = (log.read_text().strip().splitlines() or ["starting"])[-1]
                console.print(f"  {now - begun:.0f} s: {last}", highlight=False, markup=False)
            time.sleep(_SAMPLE_EVERY_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return time.monotonic() - begun, samples


def tenths(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """Median MiB of the second and of the last tenth; caches fill during the first."""
    values = [mb for _, mb in samples]
    length = max(1, len(values) // 10)
    return statistics.median(values[length : 2 * length] or values), statistics.median(values[-length:])


def draw(samples: Samples, path: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = picture.subplots()
    for name, points in samples.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set_xlabel("seconds")
    axes.set_ylabel("unique memory (USS), MiB")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    axes.grid(color="#e4e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=140)


def show(samples: Samples, title: str) -> Table:
    table = Table(
        title=title,
        caption="Unique memory (USS), MiB: median of the second and of the last tenth of the time.",
        title_justify="left",
    )
    for name in ("process", "second tenth", "last tenth", "ratio", "peak"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for name, points in samples.items():
        if points[-1][0] - points[0][0] < _LEAST_S:
            continue
        early, late = tenths(points)
        table.add_row(name, f"{early:.0f}", f"{late:.0f}", f"{late / early:.3f}", f"{max(mb for _, mb in points):.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tiny_models.write("minigpt4", out / "model")
    values = settings(out, out / "model", arguments.records, actors=2)
    values["editor"] = {"name": "ftl", "sites": ["layers.-1.ffn.out"]}
    values["stopping"] = {"max_steps": 1}
    values["keep_edits"] = True
    values["pipeline"] |= {"threads_per_actor": 1}
    with two_nodes(cpus=2) as cluster:
        values["pipeline"]["ray_address"] = cluster.gcs
        seconds, samples = run(out, values, cluster, console)
    table = dataset.dataset(f"{values['out']}/results").to_table(columns=["index", "status"])
    distinct = len(set(table["index"].to_pylist()) & set(range(arguments.records)))
    edited = table["status"].to_pylist().count("edited")
    (out / "soak.json").write_text(json.dumps({"seconds": seconds, "rows": table.num_rows, "samples": samples}) + "\n")
    draw(samples, out / "soak.png")
    title = f"{arguments.records:,} records in groups of {BATCH} on two nodes: {seconds:.0f} s, "
    title += f"{table.num_rows:,} rows, {distinct:,} distinct, {edited:,} edited."
    Console(width=110).print(show(samples, title))
    if not table.num_rows == distinct == arguments.records:
        raise SystemExit("Not every record has exactly one row.")


if __name__ == "__main__":
    main()
