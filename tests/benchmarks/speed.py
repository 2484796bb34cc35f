"""Time of an edit relative to the reference loop, its FLOPs and its base editor, and by the size of the batch.

    python -m tests.benchmarks.speed [--size mid|embedded] [--parts reference,floor,overhead,batches] [--out DIR]
    python -m tests.benchmarks.speed --size opt-2.7b --device cuda --dtype bfloat16 --parts throughput \\
        [--editors wise,tpatcher] [--edits-at-once 32]

Both numbers of every ratio are measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from odedit import (
    EditRequest,
    EvaluationConfig,
    Objective,
    ObjectiveConfig,
    Stopping,
    calibrate,
    edit,
    evaluate,
    load_editor,
)
from odedit.backbones import encode_requests, is_connector
from odedit.data.negatives import NegativePool
from odedit.editors.base import Measuring, Trainable
from odedit.inputs.batch import EditBatch, stack_params
from odedit.objectives import base
from odedit.runtime import stages
from odedit.runtime.peak_memory import peak_memory
from odedit.runtime.process import settle
from pipeline.workers.preparer import process
from tests.benchmarks import models
from tests.benchmarks.floor import EVERYTHING, Floor, product_rate, wait
from tests.benchmarks.reference import TEMPLATE, Reference
from tests.benchmarks.tables import bars, show
from tests.support.requests import make_request

EDITORS = ("wise", "tpatcher", "mend", "unike", "ftl", "ftv", "lora")
STEPS = {"wise": 10, "tpatcher": 40, "mend": 0, "unike": 20, "ftl": 15, "ftv": 15, "lora": 15}
OBJECTIVES = ("native", "odedit", "contrast")
POOL = 64
REPEATS = 3
"""Repetitions of each compared run, alternating; the shortest counts, because other load only adds time."""
FAR_COLUMNS = {"m_loc": "m_loc_far", "m_loc_mmedit": "m_loc_far_mmedit", "m_loc_generated": "m_loc_far_generated"}


@dataclass
class Measured:
    """Seconds per edit by stage, results and rows of one run."""

    seconds: dict[str, float]
    results: list[Any]
    rows: list[dict[str, Any]]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Bench:
    """A model, its editors, and any number of requests."""

    def __init__(self, size: str, device: str = "cpu", dtype: str = "float32") -> None:
        self.backbone: Any = models.load(size, device=device, dtype=dtype)
        self.device = device
        self.sigma2_0 = calibrate(self.backbone, self.requests(8, 5000), TEMPLATE)
        self._pools: dict[bool, NegativePool] = {}

    def requests(self, count: int, first: int = 0) -> list[EditRequest]:
        """Requests with processed pictures, as from the CPU stage of the pipeline."""
        return [process(make_request(first + i), self.backbone.processor, {}) for i in range(count)]

    def editor(self, name: str, **changes: Any) -> Any:
        layers = self.backbone.num_layers
        # WISE: the published site of BLIP-2 at the same relative depth, layer 23 of 32.
        settings: dict[str, dict[str, Any]] = {
            "wise": {"site": f"layers.{layers * 23 // 32}.ffn.in"},
            "ftl": {"sites": ("layers.-1.ffn.out",), "learning_rate": 1e-3},
            "lora": {"learning_rate": 1e-3},
        }
        editor: Any = load_editor(name, settings.get(name, {}) | changes)
        if isinstance(editor, Trainable):
            # Untrained weights have the same cost as trained ones.
            editor = editor.with_weights(editor.initial_weights(self.backbone, 0))
        if isinstance(editor, Measuring):
            editor = editor.measured(self.backbone, encode_requests(self.backbone, self.requests(8, 6000), TEMPLATE)[0])
        return editor

    def objective(self, name: str) -> base.Objective:
        return Objective(ObjectiveConfig(name=name, sigma2_0=self.sigma2_0))

    def run(
        self,
        editor: Any,
        objective: base.Objective,
        requests: Sequence[EditRequest],
        steps: int,
        width: int,
        evaluation_config: EvaluationConfig = EVERYTHING,
    ) -> Measured:
        """Edits and scores `width` requests at a time; every edit takes `steps` steps."""
        with stages.measured() as account:
            results, rows = self._edit_and_score(editor, objective, requests, steps, width, evaluation_config)
        seconds = {name: value / len(requests) for name, value in account.seconds.items()}
        return Measured(seconds, results, rows)

    def seconds(
        self,
        editor: Any,
        objective: base.Objective,
        requests: Sequence[EditRequest],
        steps: int,
        width: int,
        evaluation_config: EvaluationConfig,
    ) -> float:
        """Wall-clock seconds per edit, without timing stages, which synchronises with the GPU."""
        wait(self.device)
        started = time.perf_counter()
        self._edit_and_score(editor, objective, requests, steps, width, evaluation_config)
        wait(self.device)
        return (time.perf_counter() - started) / len(requests)

    def encoded(
        self, editor: Any, objective: base.Objective, requests: Sequence[EditRequest]
    ) -> tuple[EditBatch, EditBatch]:
        """Encoded batches, with hard negatives if the objective reads any; features of the pool are cached."""
        if not objective.config.num_negatives:
            return encode_requests(self.backbone, requests, TEMPLATE, editor.sites)
        before = any(map(is_connector, editor.sites))
        if before not in self._pools:
            pictures = [
                request.edit.picture for request in self.requests(POOL, 7000) if request.edit.picture is not None
            ]
            features = self.backbone.image_features(pictures, before)
            self._pools[before] = NegativePool(features, objective.config.num_negatives)
        return encode_requests(self.backbone, requests, TEMPLATE, editor.sites, self._pools[before])

    def _edit_and_score(
        self,
        editor: Any,
        objective: base.Objective,
        requests: Sequence[EditRequest],
        steps: int,
        width: int,
        evaluation_config: EvaluationConfig,
    ) -> tuple[list[Any], list[dict[str, Any]]]:
        results: list[Any] = []
        rows: list[dict[str, Any]] = []
        stopping = Stopping(max_steps=steps, worst_token_nll=1e-9)
        for start in range(0, len(requests), width):
            part = requests[start : start + width]
            with stages.stage("encode"):
                supervision, evaluation = self.encoded(editor, objective, part)
            edited = edit(self.backbone, editor, objective, supervision, stopping, results_on=self.device)
            with stages.stage("evaluation"):
                params = stack_params([result.params for result in edited])
                rows += evaluate(self.backbone, editor, params, evaluation, evaluation_config)
            results += edited
        return results, rows


def against_reference(bench: Bench, out: Path, width: int = 8) -> None:
    """Compares speed and results with the reference, evaluation included."""
    table = []
    for name in ("wise", "tpatcher"):
        editor, objective, steps = bench.editor(name), bench.objective("odedit"), STEPS[name]
        requests = bench.requests(width)
        plain, index, seconds, total = Reference(bench.backbone, editor, objective), 1, float("inf"), float("inf")
        bench.run(editor, objective, requests[:2], 2, 2)  # warm-up of both
        plain.edit(requests[0], 1)
        for _ in range(2):
            ours = bench.run(editor, objective, requests, steps, width)
            started = time.perf_counter()
            params, terms = plain.edit(requests[index], steps)
            row = plain.score(requests[index], params)
            seconds, total = min(seconds, time.perf_counter() - started), min(total, ours.total)
        curves, shown = ours.results[index].curves, ours.rows[index]
        apart = max(
            abs(float(at.risks[risk].detach()) - curves[risk][step]) / max(1.0, abs(curves[risk][step]))
            for step, at in enumerate(terms)
            for risk in ("rel", "loc", "gen")
        )
        same = sum(abs(value - shown[FAR_COLUMNS.get(key, key)]) < 1e-6 for key, value in row.items())
        table.append([name, steps, width, seconds, total, seconds / total, apart, f"{same} of {len(row)}"])
    columns = ["editor", "steps", "E", "reference s/edit", "s/edit", "times faster", "risks apart by", "equal figures"]
    show("ODEdit against the reference loop", columns, table, out, "reference")
    bars("Seconds per edit", [f"{row[0]} {way}" for row in table for way in ("reference", "odedit")],
         {"s": [row[3 + i] for row in table for i in range(2)]}, "s", out / "reference.png")  # fmt: skip


def against_floor(bench: Bench, out: Path, width: int = 8) -> None:
    """Compares the time per edit with its FLOPs at this machine's matrix product rate."""
    table, labels, stacked = [], [], []
    for name in EDITORS:
        editor = bench.editor(name)
        for objective_name in OBJECTIVES[:2]:
            objective, requests = bench.objective(objective_name), bench.requests(width)
            bench.run(editor, objective, requests[:2], 1, 2)
            rate, runs = product_rate(bench.device), []
            for _ in range(REPEATS):
                runs.append(bench.run(editor, objective, requests, STEPS[name], width))
                rate = max(rate, product_rate(bench.device))
            best = min(runs, key=lambda run: run.total)
            floor = _floor(bench, editor, objective, requests, STEPS[name])
            parts = [floor.features(), floor.prefix(), floor.steps(), floor.evaluation()]
            at_best = floor.total() / rate
            table.append([f"{name} {objective_name}", STEPS[name], rate / 1e9, floor.total() / 1e9, at_best,
                          best.total, best.total / at_best])  # fmt: skip
            labels += [f"{name} {objective_name}", f"{name} {objective_name}, floor"]
            got = best.seconds
            moving = sum(
                value for stage, value in got.items() if stage.startswith("edit: ") and stage != "edit: prefix"
            )
            stacked += [
                [got["image features"], got["edit: prefix"], moving, got["evaluation"]],
                [p / rate for p in parts],
            ]
    columns = ["editor", "steps", "GFLOP/s", "GFLOP/edit", "floor s/edit", "s/edit", "times the floor"]
    show("Time per edit against its FLOPs", columns, table, out, "floor")
    names = ("image features", "prefix", "steps", "evaluation")
    bars(
        "Seconds per edit",
        labels,
        {n: [row[i] for row in stacked] for i, n in enumerate(names)},
        "s",
        out / "floor.png",
    )


def overhead(bench: Bench, out: Path, editors: Sequence[str] = EDITORS, width: int = 8) -> None:
    """Measures the time and peak memory that an objective adds to its base editor at the same number of steps."""
    weights = sum(p.numel() * p.element_size() for p in bench.backbone.model.parameters())
    table = []
    for name in editors:
        editor, requests = bench.editor(name), bench.requests(width)
        seconds: dict[str, list[float]] = {objective_name: [] for objective_name in OBJECTIVES}
        moving: dict[str, list[float]] = {objective_name: [] for objective_name in OBJECTIVES}
        peaks = {}
        for _ in range(REPEATS):
            for objective_name in OBJECTIVES:
                run = bench.run(editor, bench.objective(objective_name), requests, STEPS[name], width)
                seconds[objective_name].append(run.total)
                moving[objective_name].append(sum(v for k, v in run.seconds.items() if k.startswith("edit: ")))
        for objective_name in OBJECTIVES:
            objective = bench.objective(objective_name).without_warmup()
            supervision, _ = bench.encoded(editor, objective, requests)
            with peak_memory(bench.device) as peak:
                edit(bench.backbone, editor, objective, supervision, Stopping(3, 1e-9))
            peaks[objective_name] = weights + peak.bytes
        best = {key: min(values) for key, values in seconds.items()}
        steps = {key: min(values) for key, values in moving.items()}
        for objective_name in OBJECTIVES[1:]:
            more = peaks[objective_name] / peaks["native"] - 1
            table.append([f"{name} {objective_name}", STEPS[name], best["native"], best[objective_name],
                          best[objective_name] / best["native"], steps[objective_name] / steps["native"],
                          peaks["native"] / 2**20, peaks[objective_name] / 2**20, f"{100 * more:+.1f} %"])  # fmt: skip
    of_both = ["native s/edit", "s/edit", "times", "times, loop alone", "native MiB", "MiB", "memory"]
    show("Cost of an objective", ["editor", "steps", *of_both], table, out, "overhead")
    labels = [f"{row[0]}{way}" for row in table for way in (": native", "")]
    bars("Seconds per edit", labels, {"s": [row[2 + i] for row in table for i in range(2)]}, "s", out / "overhead.png")


def throughput(bench: Bench, out: Path, editors: Sequence[str] = EDITORS, width: int = 32) -> None:
    """Measures edits per second from pictures to teacher-forced scores, share of the matrix product rate, and memory.

    Two rates: scored on the edit alone, without pictures of other probes, and with all scores.
    """
    config = EvaluationConfig(generate=False, mmedit=False)
    weights = sum(p.numel() * p.element_size() for p in bench.backbone.model.parameters())
    dtype = next(bench.backbone.model.parameters()).dtype
    rate = product_rate(bench.device, dtype, 8192 if bench.device != "cpu" else 2048)
    everything = bench.requests(2 * width)
    scored_alone = [replace(request, probes={}) for request in everything]
    table, shown = [], {}
    for name in editors:
        editor, steps, peaks = bench.editor(name), STEPS[name], {}
        # FT-V trains all weights of the connector per edit.
        at_once = 2 if name == "ftv" else width
        requests, with_all = (some[: 2 * at_once] for some in (scored_alone, everything))
        for objective_name in OBJECTIVES:
            objective = bench.objective(objective_name)
            way = editor, objective
            bench.seconds(*way, requests[:at_once], min(steps, 3), at_once, config)
            with peak_memory(bench.device) as peak:
                bench.seconds(*way, requests[:at_once], steps, at_once, config)
            peaks[objective_name] = weights + peak.bytes
            alone = min(bench.seconds(*way, requests, steps, at_once, config) for _ in range(2))
            full = bench.seconds(*way, with_all, steps, at_once, config)
            arm = f"{name} {objective_name}"
            shown[arm] = bench.run(*way, requests, steps, at_once, config).seconds
            more = f"{100 * (peaks[objective_name] / peaks['native'] - 1):+.1f} %"
            print(f"{arm}: {1 / alone:.3g} edits/s", flush=True)
            of_alone, of_full = (_floor(bench, *way, some, steps).total(config) for some in (requests, with_all))
            table.append([arm, steps, at_once, 1 / alone, of_alone / alone / rate, 1 / full, of_full / full / rate,
                          peaks[objective_name] / 2**30, more])  # fmt: skip
    rates = ["edits/s, reliability", "share of peak", "edits/s, all figures", "share of peak, all"]
    columns = ["editor", "steps", "E", *rates, "peak GiB", "memory"]
    title = f"{bench.device}, {dtype}: matrix products at {rate / 1e12:.3g} TFLOP/s"
    show(title, columns, table, out, "throughput")
    names = list(dict.fromkeys(stage for seconds in shown.values() for stage in seconds))
    by_stage = [[arm, *(1e3 * seconds.get(stage, 0.0) for stage in names)] for arm, seconds in shown.items()]
    show("ms per edit, each stage waited for", ["editor", *names], by_stage, out, "throughput_stages")
    parts = {stage: [row[1 + i] for row in by_stage] for i, stage in enumerate(names)}
    bars("ms per edit", list(shown), parts, "ms", out / "throughput.png")


def _floor(bench: Bench, editor: Any, objective: base.Objective, requests: Sequence[EditRequest], steps: int) -> Floor:
    supervision, evaluation = bench.encoded(editor, objective, requests)
    read = supervision.select(objective.slots(editor, supervision))
    shown = read.select(objective.slots_at_once(read.slots))
    return Floor(bench.backbone, editor, read, evaluation, steps, shown)


def batches(bench: Bench, out: Path, sizes: Sequence[int] = (1, 4, 16, 64)) -> None:
    """Measures the time per edit by the number of edits that move together."""
    table, lines = [], {}
    arms = [(name, name, {}) for name in ("wise", "tpatcher", "mend", "ftl", "lora")]
    for title, name, changes in [*arms, ("wise, last layer", "wise", {"site": "layers.-1.ffn.in"})]:
        editor, objective = bench.editor(name, **changes), bench.objective("odedit")
        bench.run(editor, objective, bench.requests(2), 2, 2)
        seconds = []
        for size in sizes:
            count = max(size, 8)
            runs = [bench.run(editor, objective, bench.requests(count), STEPS[name], size).total for _ in range(2)]
            seconds.append(min(runs))
        lines[title] = seconds
        table.append([title, *(1e3 * s for s in seconds), *(seconds[0] / s for s in seconds[1:])])
    columns = ["editor", *(f"E={size} ms/edit" for size in sizes), *(f"E={size} times" for size in sizes[1:])]
    show("Edits that move together", columns, table, out, "batches")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in lines.items():
        axes.plot(sizes, [1e3 * value for value in values], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="edits that move together", ylabel="ms per edit", title="Time per edit")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.legend(frameon=False)
    figure.savefig(out / "batches.png", dpi=130)
    pyplot.close(figure)


PARTS: dict[str, Any] = {
    "reference": against_reference,
    "floor": against_floor,
    "overhead": overhead,
    "batches": batches,
    "throughput": throughput,
}
"""Measurements by name; `throughput` is for a GPU and not run by default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mid", choices=("embedded", *models.SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parts", default=",".join(list(PARTS)[:-1]))
    parser.add_argument("--editors", default=",".join(EDITORS), help="editors of overhead and throughput")
    parser.add_argument("--edits-at-once", type=int, default=32, help="edits that move together in throughput")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("bench"))
    chosen = parser.parse_args()
    settle(chosen.threads, chosen.device)
    bench = Bench(chosen.size, chosen.device, chosen.dtype)
    editors = {"editors": chosen.editors.split(",")}
    of_part = {"overhead": editors, "throughput": editors | {"width": chosen.edits_at_once}}
    for part in chosen.parts.split(","):
        PARTS[part](bench, chosen.out / chosen.size, **of_part.get(part, {}))


if __name__ == "__main__":
    main()
