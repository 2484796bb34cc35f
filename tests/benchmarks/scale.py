"""How a run grows with the number of its records: the driver's memory, and records per second.

    python -m tests.benchmarks.scale --sizes 100,1000,10000,100000 --out runs/scale

Every size is a run of its own, `odedit edit` in a process of its own, with an editor that edits nothing and the
cheapest evaluation; so what is measured is the pipeline. Beside it, the same groups in a bare loop and by a worker
without Ray: the difference is what a group's results cost. Writes `scale.json` and `scale.png`.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models  # noqa: E402

from tests.support.mmedit_files import record, write_images  # noqa: E402

BATCH = 8
PICTURES = 4
BARE_GROUPS = 64
REFERENCE = 1000
_SAMPLE_EVERY_S = 0.25
_SAY_EVERY_S = 30.0
_SPEED = re.compile(r"(\d+)/(\d+) records.* ([\d.]+) records/s")


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        seconds: Of the whole command.
        rate: Records per second while the workers worked, as the run's own last line has it.
        peak_mb, start_mb: Memory that the driver process has to itself (USS), in MiB: at most, and when the first
            group was finished.
        driver_ms: Processor time of the driver for a record, from the first finished group on.
        rows: Result rows; `distinct` of them differ in their record.
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
    """A file of so many records over a few pictures; returns the `data` section."""
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
    """Runs the command and watches its process; not the workers', which are Ray's."""
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
    found = _SPEED.findall(log.read_text())
    table = dataset.dataset(f"{values['out']}/results").to_table(columns=["index", "edit_id"])
    return Measured(
        records=count,
        seconds=seconds,
        rate=float(found[-1][2]),
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
    """Seconds since the start, MiB, whether a first group is finished, processor seconds; until the process ends."""
    driver, works, said = psutil.Process(process.pid), False, begun
    while process.poll() is None:
        try:
            mb = driver.memory_full_info().uss / 2**20
            cpu = sum(driver.cpu_times()[:2])
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it is ending
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
    """A run's job, its groups as the CPU stage hands them over, and a function that edits and scores a group's requests
    on one thread, with nothing around it.
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
    found = preflight.prepare(config)
    job = Job(config, found.sources, found.workspace)
    preparer = Preparer(job)
    groups = [preparer(group) for group in range(len(found.staged.usable))]
    # As a worker does: pictures that come again are not computed again.
    backbone = with_feature_cache(load_backbone(config.backbone.family, config.backbone.checkpoint))
    editor = editors.find(config.editor.name)(config.editor.settings)
    objective, template = Objective(config.objective.settings), find_template(config.data.template)

    def work(requests: Any) -> None:
        supervision, evaluation = encode_requests(backbone, requests, template, editor.sites)
        edited = edit(backbone, editor, objective, supervision, config.stopping, config.seed)
        params = stack_params([one.params for one in edited])
        evaluate(backbone, editor, params, evaluation, config.evaluation)

    return job, groups, work


def group_seconds(values: dict[str, Any]) -> tuple[float, float]:
    """Median seconds per group, of a plain loop over requests that are prepared already, and of a worker's call.

    In turns in one process, since the load of a shared machine changes what either takes.
    """
    from pipeline.workers.editor import EditActor

    job, groups, work = bare_loop(values)
    actor = EditActor(job)

    def timed(function: Any, *arguments: Any) -> float:
        begun = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - begun

    for group in groups[:8]:  # to warm up
        work(group.requests)
    pairs = [(timed(work, group.requests), timed(actor, group)) for group in groups]
    in_loop, in_worker = zip(*pairs, strict=True)
    return statistics.median(in_loop), statistics.median(in_worker)


def in_own_process(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def show(found: list[Measured], bare: float, worker: float) -> Table:
    base = next((one.peak_mb for one in found if one.records == REFERENCE), None)
    table = Table(
        title=f"Growth with the number of records. A group of {BATCH}, alone on the machine: "
        f"bare loop {1000 * bare:.1f} ms, worker {1000 * worker:.1f} ms ({worker / bare - 1:+.0%})",
        caption="Of the driver alone, from the first finished group on: memory (USS), processor time of a record.",
        title_justify="left",
    )
    names = ("records", "seconds", "records/s", "ms/group", "start MiB", "peak MiB", "ratio", "driver ms", "rows")
    for name in names:
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            f"{one.records:,}",
            f"{one.seconds:.0f}",
            f"{one.rate:.1f}",
            f"{1000 * one.group_seconds:.1f}",
            f"{one.start_mb:.0f}",
            f"{one.peak_mb:.0f}",
            "" if base is None else f"{one.peak_mb / base:.3f}",
            f"{one.driver_ms:.2f}",
            f"{one.rows:,}" + ("" if one.rows == one.distinct == one.records else "  WRONG"),
        )
    return table


def draw(found: list[Measured], path: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9.0, 3.6), layout="constrained")
    sizes = [one.records for one in found]
    left, right = picture.subplots(1, 2)
    left.plot(sizes, [one.peak_mb for one in found], "o-", color="#0b6bcb")
    base = next((one.peak_mb for one in found if one.records == REFERENCE), None)
    if base is not None:
        left.axhspan(0.9 * base, 1.1 * base, color="#0b6bcb", alpha=0.12, label="1,000 records ± 10 %")
        left.legend(frameon=False, loc="lower left")
    left.set_ylabel("peak memory of the driver, MiB")
    left.set_yscale("log")
    left.set_ylim(100, 2000)
    right.plot(sizes, [one.rate for one in found], "o-", color="#d97706", label="once workers work")
    right.plot(sizes, [one.records / one.seconds for one in found], "s--", color="#7b8794", label="whole command")
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
    found: list[Measured] = []
    shutil.rmtree(out / "bare", ignore_errors=True)
    (out / "bare").mkdir()
    bare, worker = in_own_process(group_seconds, settings(out / "bare", model, BATCH * BARE_GROUPS, arguments.actors))
    console.print(f"a group of {BATCH}: bare loop {1000 * bare:.1f} ms, worker {1000 * worker:.1f} ms", highlight=False)
    for size in map(int, arguments.sizes.split(",")):
        folder = out / f"{size}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        console.print(f"{size} records ...", highlight=False)
        found.append(measure(folder, settings(folder, model, size, arguments.actors), size, console))
        values = {
            "batch": BATCH,
            "bare_group_seconds": bare,
            "worker_group_seconds": worker,
            "runs": [asdict(one) for one in found],
        }
        (out / "scale.json").write_text(json.dumps(values, indent=1) + "\n")
        draw(found, out / "scale.png")
    Console(width=110).print(show(found, bare, worker))
    if any(not one.rows == one.distinct == one.records for one in found):
        raise SystemExit("Not every record has exactly one row.")


if __name__ == "__main__":
    main()
