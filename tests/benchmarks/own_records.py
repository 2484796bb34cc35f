"""What it costs that supervision is made: edits of the embedded world, with full records and with triples.

    python -m tests.benchmarks.own_records [--edits 48] [--out DIR]

Validation split, FT-L. The full records have supervision of their own and the training split as the pool; the triples
are the same records with picture, question and answer, and the probes that score them. `alone` trains the triple by its
likelihood, `own pictures` and `folder` make the supervision, the latter with 256 unlabelled pictures of the training
split.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from odedit import world
from odedit.data.fields import FACTS, FIELDS
from pipeline.config.run import from_dict
from pipeline.driver.run import run
from pipeline.workers import ray_session

METRICS = ("rel", "t_gen", "m_gen", "t_loc", "m_loc_far", "m_loc_near", "steps")
_KEPT = ("edit_id", "task", "probes", *FACTS, *(name for name in FIELDS if name != "pred"))
_PICTURES = 256


def arms(folder: Path, edits: int) -> dict[str, dict[str, Any]]:
    """Sections of each arm's configuration, whose files are written to the folder."""
    world.build(folder / "world")
    records = json.loads((folder / "world/validation.json").read_text())
    random.Random(0).shuffle(records)
    chosen = records[:edits]
    triples = [{name: record[name] for name in _KEPT if name in record} for record in chosen]
    for name, part in (("full", chosen), ("triples", triples)):
        (folder / f"{name}.json").write_text(json.dumps(part))
    (folder / "pictures").mkdir()
    pool = folder / "world/train.json"
    for number, record in enumerate(json.loads(pool.read_text())[:_PICTURES]):
        shutil.copy(folder / "world/images" / record["image"], folder / f"pictures/{number}.png")
    roots = {"image_root": str(folder / "world/images"), "rephrase_root": str(folder / "world/images_rephrase")}
    short = {"path": str(folder / "triples.json"), **roots}
    contrast = {"name": "contrast"}
    return {
        "full records": {
            "data": {"path": str(folder / "full.json"), "pool": str(pool), **roots},
            "objective": contrast,
        },
        "triples, own pictures": {"data": short, "objective": contrast},
        "triples, folder": {"data": short | {"pictures": str(folder / "pictures")}, "objective": contrast},
        "triples alone": {"data": short, "objective": {"name": "native"}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("own-records"))
    options = parser.parse_args()
    common = {
        "editor": {"name": "ftl", "learning_rate": 1e-3},
        "stopping": {"worst_token_nll": 0.3, "max_steps": 100},
        "evaluation": {"generate": False},
        "pipeline": {"batch_size": 12},
        "tracking": {"enabled": False},
        "keep_edits": False,
    }
    options.out.mkdir(parents=True)
    print(f"| | {' | '.join(METRICS)} |\n|---|{'--:|' * len(METRICS)}")
    with ray_session.shared():
        for number, (name, sections) in enumerate(arms(options.out, options.edits).items()):
            config = from_dict(common | sections | {"out": str(options.out / f"run-{number}")})
            means = run(config, Console(stderr=True)).summary["metrics"]
            figures = [format(means[metric]["mean"], ".3f") for metric in METRICS]
            print(f"| {name} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
