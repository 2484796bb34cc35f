"""Records of a study, drawn from the embedded benchmark: several seeds in one file, facts spread evenly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from odedit.errors import InputError, counted
from odedit.runtime.addresses import below
from odedit.storage.atomic import folder_written_atomically
from odedit.storage.location import Location, at
from odedit.world.facts import WORLD
from pipeline.run_folder.sources import build_embedded, embedded_name
from pipeline.study.spec import Draw

_POOL_SEED = 0
_REPHRASE = "rephrase:"

Record = dict[str, Any]


def write(draw: Draw, folder: Path | str, at_least: int = 0) -> dict[str, str]:
    """Writes the records under `folder` and returns the `data` section of a run that edits them.

    A new local folder is written atomically. Edits of different seeds have different ids and the same facts, so that
    tests over seeds are clustered by fact.

    Args:
        draw: Split, seeds and number of records.
        folder: Path or address.
        at_least: Number of records that are needed.

    Raises:
        InputError: The split has fewer edits of a task than `draw.per_task`, or fewer than are needed.
    """
    location = at(folder)
    if location.is_local and not location.exists():
        try:
            with folder_written_atomically(Path(location)) as temporary:
                names = _write(draw, at(temporary), at_least)
        except OSError:
            if not location.is_folder():  # another process may have written it meanwhile
                raise
            names = _write(draw, location, at_least)
    else:
        names = _write(draw, location, at_least)
    root = str(folder)
    path, pool = (below(root, name) for name in names)
    return {"path": path, "image_root": root, "rephrase_root": root, "pool": pool}


def _write(draw: Draw, folder: Location, at_least: int) -> tuple[str, str]:
    """Writes the records and the pool; returns the names of their files."""
    records = [record for seed in draw.seeds for record in _drawn(draw, seed, folder)]
    if len(records) < at_least:
        raise InputError(
            f"models.sizes: got {at_least}; {counted(len(records), 'record')} of the {draw.split} split are drawn."
        )
    seeds = "-".join(str(seed) for seed in draw.seeds)
    world = f"world{WORLD}-" if WORLD else ""
    number = draw.per_task or "all" if draw.per_fact is None else f"{draw.per_fact}-a-fact"
    rephrases = f"-rephrases-{draw.rephrases}" if draw.rephrases > 1 else ""
    name, pool = f"{world}{draw.split}-seeds-{seeds}-{number}{rephrases}.json", f"{world}pool.json"
    write_json(folder / name, records)
    pool_records = [_moved(record, embedded_name(_POOL_SEED)) for record in _read(folder, _POOL_SEED, "train")]
    write_json(folder / pool, pool_records)
    return name, pool


def _drawn(draw: Draw, seed: int, folder: Location) -> list[Record]:
    """The drawn records of a seed, with pictures and ids as in the study's file."""
    ordered = by_turns(_read(folder, seed, draw.split, draw.rephrases), draw.per_fact)
    chosen = _of_tasks(draw, ordered) if draw.per_fact is None else ordered
    name = embedded_name(seed, draw.rephrases)
    return [_moved(record, name) | {"edit_id": f"s{seed}-{record['edit_id']}"} for record in chosen]


def by_turns(records: Sequence[Record], per_fact: int | None = None) -> list[Record]:
    """The first record of every fact in the given order, then the second of every fact, ...

    Args:
        records: Records of the embedded benchmark.
        per_fact: Largest number of records of a fact; None: all.
    """
    seen: Counter[str] = Counter()
    turns: dict[int, list[Record]] = {}
    for record in records:
        turns.setdefault(seen[record["fact"]], []).append(record)
        seen[record["fact"]] += 1
    return [record for turn in sorted(turns)[:per_fact] for record in turns[turn]]


def _of_tasks(draw: Draw, ordered: list[Record]) -> list[Record]:
    """`draw.per_task` records of each task: the first of every fact in the benchmark's order, then the second, ..."""
    chosen: list[Record] = []
    for task in ("vqa", "caption"):
        of_task = [record for record in ordered if record["task"] == task]
        if draw.per_task is not None and len(of_task) < draw.per_task:
            raise InputError(
                f"draw.per_task: got {draw.per_task}; the {draw.split} split has {counted(len(of_task), 'edit')} "
                f"of task {task!r}."
            )
        chosen += of_task[: draw.per_task]
    return chosen


def _read(folder: Location, seed: int, split: str, rephrases: int = 1) -> list[Record]:
    benchmark = folder / embedded_name(seed, rephrases)
    build_embedded(benchmark, seed, rephrases)
    records: list[Record] = json.loads((benchmark / f"{split}.json").read_text())
    return records


def _moved(record: Record, benchmark: str) -> Record:
    """The record with picture paths relative to the folder that holds all benchmarks."""

    def moved(path: str) -> str:
        if path.startswith(_REPHRASE):
            return f"{_REPHRASE}{benchmark}/images_rephrase/{path.removeprefix(_REPHRASE)}"
        return f"{benchmark}/images/{path}"

    def each(probes: dict[str, Record]) -> dict[str, Record]:
        return {
            name: probe | {"image": moved(probe["image"])} if probe.get("image") else probe
            for name, probe in probes.items()
        }

    return record | {
        "image": moved(record["image"]),
        "m_loc": moved(record["m_loc"]),
        "image_rephrase": f"{benchmark}/images_rephrase/{record['image_rephrase']}",
        "probes": each(record["probes"]),
        "held_out": each(record["held_out"]),
    }


def write_json(path: Location, records: list[Record]) -> None:
    """Writes the file unless its content is the same: the time of an input file is part of a run's identity."""
    text = json.dumps(records, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
