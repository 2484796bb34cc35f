"""Causes every fault once and measures the time and the records that it costs.

    python -m tests.faults.table --out bench

Each fault is measured against the same command without it, run just before. Prints a table and writes it to
`faults.md`; fails if a record is lost. Starts Ray about thirty times, and an MLflow server.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from tests.faults.bench import EDITS, Bench  # noqa: E402
from tests.faults.lossless import Faced, check, lost  # noqa: E402
from tests.faults.scenarios import FAULTS, Fault  # noqa: E402

COLUMNS = ("fault", "what happens", "time lost", "records lost")


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def row(fault: Fault, bench: Bench, faced: Faced) -> str:
    return line(fault.name, fault.answer, f"{faced.seconds - faced.undisturbed:.0f} s", len(lost(bench, faced)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--only", nargs="*", help="names of scenarios, such as worker_killed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, lines, undisturbed = Console(stderr=True), [line(*COLUMNS), line("---", "---", "--:", "--:")], []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), quick=False)
        for fault in FAULTS:
            name = fault.face.__name__
            if arguments.only and name not in arguments.only:
                continue
            faced = fault.face(bench, bench.folder / name)
            lines.append(row(fault, bench, faced))
            check(bench, faced)
            undisturbed.append(faced.undisturbed)
            console.print(f"{name}: {faced.seconds:.1f} s, undisturbed {faced.undisturbed:.1f} s", highlight=False)
    seconds = f"{min(undisturbed):.0f} to {max(undisturbed):.0f} s"
    text = "\n".join([*lines, "", f"{EDITS} edits; the undisturbed run takes {seconds}."])
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "faults.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
