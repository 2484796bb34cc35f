"""The records of a study, drawn from the embedded benchmark: several seeds in one file, facts spread evenly."""

from __future__ import annotations

import json
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


def write(draw: Draw, folder: Path | str) -> dict[str, str]:
    """Writes the records under `folder` and returns the `data` section of a run that edits them.

    A new folder of this machine appears whole or not at all.

    Edits of different seeds have different ids and name their facts alike, so that tests over seeds are clustered by
    fact: all facts, where so many are drawn, else those that come first in each seed's order.

    Args:
        folder: Path or address.

    Raises:
        InputError: The split has fewer edits of a task.
    """
    place = at(folder)
    if place.is_local and not place.exists():
        try:
            with folder_written_atomically(Path(place)) as temporary:
                names = _write(draw, at(temporary))
        except OSError:
            if not place.is_folder():  # else another process was faster
                raise
            names = _write(draw, place)
    else:
        names = _write(draw, place)
    root = str(folder)
    path, pool = (below(root, name) for name in names)
    return {"path": path, "image_root": root, "rephrase_root": root, "pool": pool}


def _write(draw: Draw, place: Location) -> tuple[str, str]:
    """Writes the records and the pool; returns the names of their files."""
    records = [record for seed in draw.seeds for record in _of_seed(draw, seed, place)]
    seeds = "-".join(str(seed) for seed in draw.seeds)
    world = f"world{WORLD}-" if WORLD else ""
    name, pool = f"{world}{draw.split}-seeds-{seeds}-{draw.per_task or 'all'}.json", f"{world}pool.json"
    _write_json(place / name, records)
    of_pool = [_moved(record, embedded_name(_POOL_SEED)) for record in _read(place, _POOL_SEED, "train")]
    _write_json(place / pool, of_pool)
    return name, pool


def _of_seed(draw: Draw, seed: int, folder: Location) -> list[Record]:
    """So many edits of each task: first one of every fact, then a second one, in the benchmark's own order."""
    records = _read(folder, seed, draw.split)
    rounds: dict[str, int] = {}
    ordered: list[tuple[int, int, Record]] = []
    for place, record in enumerate(records):
        turn = rounds.get(record["fact"], 0)
        rounds[record["fact"]] = turn + 1
        ordered.append((turn, place, record))
    ordered.sort(key=lambda item: item[:2])
    chosen: list[Record] = []
    for task in ("vqa", "caption"):
        of_task = [record for _, _, record in ordered if record["task"] == task]
        if draw.per_task is not None and len(of_task) < draw.per_task:
            raise InputError(
                f"draw.per_task: got {draw.per_task}; the {draw.split} split has {counted(len(of_task), 'edit')} "
                f"of task {task!r}."
            )
        chosen += of_task[: draw.per_task]
    name = embedded_name(seed)
    return [_moved(record, name) | {"edit_id": f"s{seed}-{record['edit_id']}"} for record in chosen]


def _read(folder: Location, seed: int, split: str) -> list[Record]:
    benchmark = folder / embedded_name(seed)
    build_embedded(benchmark, seed)
    records: list[Record] = json.loads((benchmark / f"{split}.json").read_text())
    return records


def _moved(record: Record, benchmark: str) -> Record:
    """The record with its pictures' paths relative to the folder that holds all benchmarks."""

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


def _write_json(place: Location, records: list[Record]) -> None:
    """Leaves a file of the same content alone: a run is told apart by its input file's time as well."""
    text = json.dumps(records, indent=1) + "\n"
    if not place.exists() or place.read_text() != text:
        place.write_text(text)
