"""Time of small runs from the command to the first row and to the end, beside another checkout of the source.

    python -m tests.benchmarks.start [--beside CHECKOUT] [--records 2,24,200] [--rounds 3] [--out DIR]

Model: the embedded BLIP-2; WISE under ODEdit with MLflow, as `odedit edit` runs with its defaults. Rounds alternate
between the checkouts, so that both see the same load of a shared machine. The first row is there when the first
result file is. CPU seconds are those of the command's own process; workers that Ray starts are not counted.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from odedit import world
from tests.benchmarks.tables import show

_POLL_S = 0.02
_SETTINGS = (
    "editor.name=wise", "editor.site=layers.2.ffn.in", "objective.name=odedit", "objective.sigma2_0=100",
    "pipeline.device=cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds of one run.

    Attributes:
        first: To the first row.
        end: To the end of the command.
        cpu: CPU seconds of the command's process.
    """

    first: float
    end: float
    cpu: float


def timed(source: Path, arguments: Sequence[str], out: Path) -> Times:
    """Times `odedit edit` from a checkout.

    Raises:
        SystemExit: The command failed; its output is printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "odedit", "edit", *arguments, f"out={out}"]
    before, began, first = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    with open(f"{out}.log", "w+") as log:
        process = subprocess.Popen(command, cwd=source, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            if not first and any((out / "results").glob("part-*.parquet")):
                first = time.monotonic() - began
            time.sleep(_POLL_S)
        end = time.monotonic() - began
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return Times(first or end, end, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--records", default="2,24,200")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/start"))
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = world.build(out / "world")
    data = (
        f"data.path={files['evaluation']}", f"data.pool={files['train']}",
        f"data.image_root={out / 'world' / 'images'}", f"data.rephrase_root={out / 'world' / 'images_rephrase'}",
    )  # fmt: skip
    here = Path(__file__).resolve().parents[2]
    sources = {"before": arguments.beside.absolute(), "now": here} if arguments.beside else {"now": here}
    rows = []
    for number in (int(text) for text in arguments.records.split(",")):
        runs: dict[str, list[Times]] = {name: [] for name in sources}
        for turn in range(arguments.rounds):
            for name, source in sources.items():
                folder = out / f"{number}-{name}-{turn}"
                runs[name].append(timed(source, (*_SETTINGS, *data, f"data.limit={number}"), folder))
        medians = {
            name: [statistics.median(getattr(times, part) for times in every) for part in ("first", "end", "cpu")]
            for name, every in runs.items()
        }
        base = medians[next(iter(sources))]
        for name, values in medians.items():
            ratios = [value / before for value, before in zip(values, base, strict=True)]
            rows.append([number, name, *values, *ratios])
    titles = ["records", "source", "first row, s", "end, s", "CPU, s", "first row", "end", "CPU"]
    show(f"Small runs, median of {arguments.rounds}; ratios to the first source", titles, rows, out, "start")


if __name__ == "__main__":
    main()
