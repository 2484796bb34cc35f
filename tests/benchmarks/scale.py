"""Memory of the driver and records per second, by the number of records of a run.

    python -m tests.benchmarks.scale --sizes 100,1000,10000,100000 --out runs/scale

Every size is a separate run of `odedit edit`, with an editor that edits nothing and the cheapest evaluation, so that
only the pipeline is measured. The same groups also run in a bare loop and in a worker without Ray; the difference is
the cost of a group's results. Writes `scale.json` and `scale.png`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from pyarrow import dataset
from rich.console import Console
from rich.table import Table

from tests.support import tiny_models
from tests.support.mmedit_files import record, write_images

ROOT = Path(__file__).resolve().parents[2]

BATCH = 8
PICTURES = 4
BARE_GROUPS = 64
REFERENCE = 1000
_SAMPLE_EVERY_S = 0.25
_SAY_EVERY_S = 30.0
_SPEED = re.compile(r"(\d+)/(\d+) records.* ([\d.]+) records/s")


@dataclass(frozen=True)
class Measured:
    """Measurements of one run.

    Attributes:
        records: Number of records.
        seconds: Duration of the command.
        rate: Records per second during editing, from the last line of the run's log.
        start_mb, peak_mb: Unique memory (USS) of the driver in MiB, when the first group was finished and at most.
        driver_ms: CPU time of the driver per record, from the first finished group on.
        rows: Number of result rows.
        distinct: Number of different records among the rows.
        samples: Seconds since the start and USS in MiB.
    """

    records: int
    seconds: float
    rate: float
    start_mb: float
    peak_mb: float
    driver_ms: float
    rows: int
    distinct: int
    samples: list[tuple[float, float]]

    @property
    def group_seconds(self) -> float:
        return BATCH / self.rate


def write_records(folder: Path, count: int) -> dict[str, Any]:
    """Writes a file of `count` records over a few pictures; returns the `data` section."""
    pictured = [record(number) for number in range(PICTURES)]
    image_root, rephrase_root = write_images(folder, pictured)
    names = ("image", "image_rephrase", "m_loc")
    path = folder / "records.json"
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            fields = record(number, **{name: pictured[number % PICTURES][name] for name in names})
            stream.write(("[" if number == 0 else ",\n") + json.dumps(fields))
        stream.write("]")
    return {"path": str(path), "image_root": str(image_root), "rephrase_root": str(rephrase_root)}


def settings(folder: Path, model: Path, count: int, actors: int) -> dict[str, Any]:
    return {
        "backbone": {"family": "minigpt4", "checkpoint": str(model)},
        "data": write_records(folder, count),
        "supervision": {"rephrase_source": "record", "locality_source": "record", "near_locality": False},
        "editor": {"name": "tests.benchmarks.idle"},
        "objective": {"name": "native"},
        "stopping": {"max_steps": 0},
        "evaluation": {"generate": False, "mmedit": False},
        "pipeline": {"actors": actors, "preparers": 1, "batch_size": BATCH, "device": "cpu"},
        "tracking": {"enabled": False},
        "keep_edits": False,
        "out": str(folder / "out"),
    }


def measure(folder: Path, values: dict[str, Any], count: int, console: Console) -> Measured:
    """Runs the command and samples its process, without the workers, which are children of Ray."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    log = folder / "log.txt"
    command = [sys.executable, "-m", "odedit", "edit", "--config", str(config)]
    begun = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
        samples = list(_samples(process, begun, Path(values["out"]) / "results", log, console))
    seconds = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    working = [mb for _, mb, works, _ in samples if works]
    busy = [cpu for *_, works, cpu in samples if works]
    speeds = _SPEED.findall(log.read_text())
    table = dataset.dataset(f"{values['out']}/results").to_table(columns=["index", "edit_id"])
    return Measured(
        records=count,
        seconds=seconds,
        rate=float(speeds[-1][2]),
        start_mb=working[0],
        peak_mb=max(working),
        driver_ms=1000 * (busy[-1] - busy[0]) / count,
        rows=table.num_rows,
        distinct=len(set(table["index"].to_pylist()) & set(range(count))),
        samples=[(round(at, 1), round(mb, 1)) for at, mb, *_ in samples[:: max(1, len(samples) // 200)]],
    )


def _samples(
    process: subprocess.Popen[Any], begun: float, results: Path, log: Path, console: Console
) -> Iterator[tuple[float, float, bool, float]]:
    """Samples until the process ends: seconds since the start, MiB, whether a group is finished, CPU seconds."""
    driver, works, said = psutil.Process(process.pid), False, begun
    while process.poll() is None:
        try:
            mb = driver.memory_full_info().uss / 2**20
            cpu = sum(driver.cpu_times()[:2])
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # the process is ending
            break
        works = works or (results.is_dir() and next(results.glob("part-*"), None) is not None)
        now = time.monotonic()
        yield now - begun, mb, works, cpu
        if now - said > _SAY_EVERY_S:
            said = now
            last = (log.read_text().strip().splitlines() or ["starting"])[-1]
            console.print(f"  {now - begun:.0f} s, {mb:.0f} MiB: {last}", highlight=False, markup=False)
        time.sleep(_SAMPLE_EVERY_S)
    process.wait()


def bare_loop(values: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """A run's job, its groups as the CPU stage prepares them, and a function that edits and scores the requests of a
    group on one thread, without the pipeline.
    """
    from odedit import editors
    from odedit.backbones import encode_requests, load_backbone
    from odedit.backbones.common.feature_cache import with_feature_cache
    from odedit.editing.loop import edit
    from odedit.evaluation.scores import evaluate
    from odedit.inputs.batch import stack_params
    from odedit.inputs.prompts import find_template
    from odedit.objectives import Objective
    from odedit.runtime.process import settle
    from pipeline.config.run import from_dict
    from pipeline.driver import preflight
    from pipeline.workers.plan import Job
    from pipeline.workers.preparer import Preparer

    settle(1, "cpu")
    config = from_dict(values)
    prepared = preflight.prepare(config)
    job = Job(config, prepared.sources, prepared.workspace)
    preparer = Preparer(job)
    groups = [preparer(group) for group in range(len(prepared.staged.usable))]
    # As in a worker, features of repeated pictures are cached.
    backbone = with_feature_cache(load_backbone(config.backbone.family, config.backbone.checkpoint))
    editor = editors.find(config.editor.name)(config.editor.settings)
    objective, template = Objective(config.objective.settings), find_template(config.data.template)

    def work(requests: Any) -> None:
        supervision, evaluation = encode_requests(backbone, requests, template, editor.sites)
        edited = edit(backbone, editor, objective, supervision, config.stopping, config.seed)
        params = stack_params([result.params for result in edited])
        evaluate(backbone, editor, params, evaluation, config.evaluation)

    return job, groups, work


def group_seconds(values: dict[str, Any]) -> tuple[float, float]:
    """Median seconds per group of the bare loop and of a worker's call.

    They alternate in one process, because the load of a shared machine changes.
    """
    from pipeline.workers.editor import EditActor

    job, groups, work = bare_loop(values)
    actor = EditActor(job)

    def timed(function: Any, *arguments: Any) -> float:
        begun = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - begun

    for group in groups[:8]:  # warm-up
        work(group.requests)
    pairs = [(timed(work, group.requests), timed(actor, group)) for group in groups]
    in_loop, in_worker = zip(*pairs, strict=True)
    return statistics.median(in_loop), statistics.median(in_worker)


def in_own_process(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def show(runs: list[Measured], bare: float, worker: float) -> Table:
    base = next((run.peak_mb for run in runs if run.records == REFERENCE), None)
    table = Table(
        title=f"Growth with the number of records. A group of {BATCH}, alone on the machine: "
        f"bare loop {1000 * bare:.1f} ms, worker {1000 * worker:.1f} ms ({worker / bare - 1:+.0%})",
        caption="Driver only, from the first finished group on: unique memory (USS), CPU time per record.",
        title_justify="left",
    )
    names = ("records", "seconds", "records/s", "ms/group", "start MiB", "peak MiB", "ratio", "driver ms", "rows")
    for name in names:
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            f"{run.records:,}",
            f"{run.seconds:.0f}",
            f"{run.rate:.1f}",
            f"{1000 * run.group_seconds:.1f}",
            f"{run.start_mb:.0f}",
            f"{run.peak_mb:.0f}",
            "" if base is None else f"{run.peak_mb / base:.3f}",
            f"{run.driver_ms:.2f}",
            f"{run.rows:,}" + ("" if run.rows == run.distinct == run.records else "  WRONG"),
        )
    return table


def draw(runs: list[Measured], path: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9.0, 3.6), layout="constrained")
    sizes = [run.records for run in runs]
    left, right = picture.subplots(1, 2)
    left.plot(sizes, [run.peak_mb for run in runs], "o-", color="#0b6bcb")
    base = next((run.peak_mb for run in runs if run.records == REFERENCE), None)
    if base is not None:
        left.axhspan(0.9 * base, 1.1 * base, color="#0b6bcb", alpha=0.12, label="1,000 records ± 10 %")
        left.legend(frameon=False, loc="lower left")
    left.set_ylabel("peak memory of the driver, MiB")
    left.set_yscale("log")
    left.set_ylim(100, 2000)
    right.plot(sizes, [run.rate for run in runs], "o-", color="#d97706", label="once workers work")
    right.plot(sizes, [run.records / run.seconds for run in runs], "s--", color="#7b8794", label="whole command")
    right.set_ylabel("records per second")
    right.set_yscale("log")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("records")
        axes.grid(color="#e4e7eb", which="both", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100,1000,10000,100000")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--actors", type=int, default=1)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model = out / "model"
    if not model.exists():
        tiny_models.write("minigpt4", model)
    runs: list[Measured] = []
    shutil.rmtree(out / "bare", ignore_errors=True)
    (out / "bare").mkdir()
    bare, worker = in_own_process(group_seconds, settings(out / "bare", model, BATCH * BARE_GROUPS, arguments.actors))
    console.print(f"a group of {BATCH}: bare loop {1000 * bare:.1f} ms, worker {1000 * worker:.1f} ms", highlight=False)
    for size in map(int, arguments.sizes.split(",")):
        folder = out / f"{size}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        console.print(f"{size} records ...", highlight=False)
        runs.append(measure(folder, settings(folder, model, size, arguments.actors), size, console))
        values = {
            "batch": BATCH,
            "bare_group_seconds": bare,
            "worker_group_seconds": worker,
            "runs": [asdict(run) for run in runs],
        }
        (out / "scale.json").write_text(json.dumps(values, indent=1) + "\n")
        draw(runs, out / "scale.png")
    Console(width=110).print(show(runs, bare, worker))
    if any(not run.rows == run.distinct == run.records for run in runs):
        raise SystemExit("Not every record has exactly one row.")


if __name__ == "__main__":
    main()
