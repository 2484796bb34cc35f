"""Whether a committed model answers without odedit as odedit's rows say: the library's classes alone, in a process
that cannot import odedit.

    python -m tests.benchmarks.served [--facts 24] [--out DIR]

Questions of the evaluation split, one for each fact, committed by joint training to the embedded models, and to a small
random Qwen2.5-VL. `agree`: share of the records for which both give one answer; `held`: odedit's share of right ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from odedit import backbones, world
from pipeline.config.run import commit_from_dict
from pipeline.driver.commit import commit
from pipeline.run_folder import rows
from pipeline.run_folder.workspace import Workspace
from tests.support import plain_answers, tiny_models


def chosen(path: Path, count: int) -> list[dict[str, str]]:
    """The first question of each of the first facts."""
    first: dict[str, dict[str, str]] = {}
    for record in json.loads(path.read_text()):
        if record["task"] == "vqa":
            first.setdefault(record["fact"], record)
    return list(first.values())[:count]


def agrees(own: str, row: str) -> bool:
    """Whether two answers are equal, or, if the row's does not end, as far as both go: it is cut elsewhere."""
    if own == row or not row.endswith(" ..."):
        return own == row
    shorter, longer = sorted((own.rstrip("\ufffd"), row.removesuffix(" ...").rstrip("\ufffd")), key=len)
    return bool(shorter) and longer.startswith(shorter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("served"))
    parser.add_argument("--families", nargs="*", default=backbones.names())
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True)
    world.build(out / "world")
    records = chosen(out / "world/evaluation.json", options.facts)
    (out / "records.json").write_text(json.dumps(records))
    print("| model | records | held | agree |\n|---|--:|--:|--:|")
    for family in options.families:
        is_embedded = family == "auto" or (world.CHECKPOINTS / family).is_dir()
        checkpoint = "embedded" if is_embedded else str(tiny_models.write(family, out / f"{family}-random"))
        images = out / "world/images"
        config = commit_from_dict(
            {
                "backbone": {"family": family, "checkpoint": checkpoint},
                "data": {
                    "path": str(out / "records.json"),
                    "pool": str(out / "world/train.json"),
                    "image_root": str(images),
                    "rephrase_root": str(out / "world/images_rephrase"),
                },
                "evaluation": {"mmedit": False},
                "tracking": {"enabled": False},
                "out": str(out / family),
            }
        )
        commit(config, Console(stderr=True))
        workspace = Workspace.of(config.out)
        after = {row["edit_id"]: row["answer_after"] for row in rows.read_rows(rows.parts(workspace))}
        expected = [after[record["edit_id"]] for record in records]
        questions = [[record["src"], str(images / record["image"])] for record in records]
        task = {"family": family, "checkpoint": str(workspace.model), "questions": questions, "max_tokens": 32}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, plain_answers.__file__], input=json.dumps([task]), capture_output=True, text=True,
            cwd=out, env=environment, check=True,
        )  # fmt: skip
        (answers,) = json.loads(done.stdout)
        same = [agrees(own, row) for own, row in zip(answers, expected, strict=True)]
        agree = sum(same) / len(records)
        held = sum(answer == record["alt"] for answer, record in zip(expected, records, strict=True)) / len(records)
        print(f"| {family} | {len(records)} | {held:.3f} | {agree:.3f} |", flush=True)


if __name__ == "__main__":
    main()
