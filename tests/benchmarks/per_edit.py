"""CPU seconds of an edit with its evaluation, beside another checkout of the source.

    python -m tests.benchmarks.per_edit [--beside CHECKOUT] [--size embedded|mid] [--editors mend,ftl,wise] [--rounds 3]

ODEdit objective, 8 edits at a time, one thread. `first` is a run of its own, from processed pictures to scores; `next`
is a further run over the same records in the same process, as an arm of a study is, which finds the features of the
pictures and, since they are kept, the unedited model's answers. Rounds alternate between the checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path
from typing import Any

STEPS = {"mend": 1, "ftl": 15, "wise": 10, "tpatcher": 40, "lora": 15, "unike": 20, "ftv": 15}
_EDITS, _WIDTH = 16, 8


def measured(size: str, editor_name: str) -> dict[str, float]:
    """CPU seconds per edit in this process, by kind of run."""
    from odedit.backbones.common.feature_cache import with_feature_cache
    from odedit.runtime.process import configure_process
    from tests.benchmarks import speed

    configure_process(1, "cpu")
    bench = speed.Bench(size)
    bench.backbone = with_feature_cache(bench.backbone, None)
    editor, objective = bench.editor(editor_name), bench.objective("odedit")
    evaluate = speed.evaluate
    if "known" in signature(evaluate).parameters:
        from odedit.evaluation.readout import UneditedAnswers

        known = UneditedAnswers()

        def with_store(*arguments: Any) -> Any:
            return evaluate(*arguments, known=known)

        speed.evaluate = with_store

    def seconds(first: int) -> float:
        requests = bench.requests(_EDITS, first)
        begun = time.process_time()
        bench.run(editor, objective, requests, STEPS[editor_name], _WIDTH)
        return (time.process_time() - begun) / _EDITS

    seconds(9000)  # warm
    return {"first": seconds(0), "next": seconds(0)}


def _in(source: Path, size: str, editor: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", editor, "--size", size]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--size", choices=["embedded", "mid"], default="mid")
    parser.add_argument("--editors", default="mend,ftl,wise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/per_edit"))
    parser.add_argument("--measure", metavar="EDITOR", help="measure here, and print JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.size, arguments.measure)))
        return
    from tests.benchmarks.tables import show

    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    here = Path(__file__).resolve().parents[2]
    sources = {"before": arguments.beside.absolute(), "now": here} if arguments.beside else {"now": here}
    rows = []
    for editor in arguments.editors.split(","):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
        for _ in range(arguments.rounds):
            for name, source in sources.items():
                runs[name].append(_in(source, arguments.size, editor))
        medians = {
            name: {kind: statistics.median(run[kind] for run in every) for kind in ("first", "next")}
            for name, every in runs.items()
        }
        base = medians[next(iter(sources))]
        for name, values in medians.items():
            ratios = [values[kind] / base[kind] for kind in values]
            rows.append([editor, name, *(1000 * value for value in values.values()), *ratios])
    titles = ["editor", "source", "first, ms", "next, ms", "first", "next"]
    show(f"CPU time of an edit with evaluation, {arguments.size}; ratios to the first source", titles, rows, out, "run")


if __name__ == "__main__":
    if __package__ in (None, ""):  # started as a file, of another checkout's packages
        sys.path.pop(0)
    main()
