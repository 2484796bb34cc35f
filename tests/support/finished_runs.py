"""Folders of finished runs, written without a model: records, pictures, result rows, settings and summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image

from odedit.data.records import RawRecord
from odedit.evaluation.columns import FAR, column
from pipeline.config.run import from_dict
from pipeline.run_folder import rows as results
from pipeline.run_folder.staging import STAGED_SCHEMA
from pipeline.run_folder.summary import summarize_results
from pipeline.run_folder.workspace import Workspace, write_json, write_table
from tests.support.mmedit_files import record

SCRIPT = "<script>document.title='taken over'</script><img src=x onerror=\"document.title='taken over'\">"
"""Text that a page would run if it took it for markup."""
PROBES = ("rel", "t_gen", "m_gen", "t_loc", "m_loc", "m_loc_near")


def write_run(
    out: Path, count: int = 12, change: Callable[[results.Row], None] = lambda row: None, pictures: int = 5
) -> Workspace:
    """Writes a run of `count` records in which every fourth edit does not hold, and two further records have no edit.

    Args:
        change: Function that changes a row before it is written.
        pictures: Number of different pictures.
    """
    workspace = Workspace.of(str(out))
    workspace.create()
    data = out.parent / "data"
    _write_pictures(data / "coco", pictures)
    config = from_dict(
        {"data": {"path": str(data / "vqa.json"), "image_root": str(data / "coco")}, "out": str(out),
         "tracking": {"enabled": False}, "editor": {"name": "ftl"}, "objective": {"name": "native"}}
    )  # fmt: skip
    (data / "vqa.json").write_text("[]")
    workspace.config.write_text(config.to_yaml())
    records = [_record(number, pictures) for number in range(count)]
    made = [edited_row(each) for each in records]
    for index, status in ((count, results.FAILED), (count + 1, results.SKIPPED)):
        records.append(_record(index, pictures))
        made.append({**_base(records[-1]), "status": status, "error": f"vqa.json, record {index}: it is {status}."})
    for row in made:
        change(row)
    staged = [each.to_row() | {"group": 0} for each in records]
    write_table(workspace.records, pyarrow.Table.from_pylist(staged, schema=STAGED_SCHEMA))
    results.write_part(workspace.part(0), made)
    summary = summarize_results(workspace, config) | {"wall_seconds": 12.5, "code": "1", "software": {"python": "3"}}
    write_json(workspace.summary, summary)
    write_json(workspace.run, {"code": "1", "seconds": 12.5})
    return workspace


def _write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour = ((97 * number) % 256, (57 * number + 80) % 256, (31 * number + 160) % 256)
        picture = Image.new("RGB", (160, 120), colour)
        picture.paste((255, 255, 255), (10 + number % 100, 20, 60 + number % 100, 70))
        picture.save(folder / f"{number}.png")


def _record(number: int, pictures: int) -> RawRecord:
    def name(offset: int) -> str:
        return f"{(number + offset) % pictures}.png"

    near = {"prompt": f"What is object {number}?", "target": "a bird", "image": name(3)}
    fields = record(number, image=name(0), image_rephrase=name(1), m_loc=name(2), probes={"m_loc_near": near})
    if number == 1:
        fields["src"] = SCRIPT
    return RawRecord("vqa.json", number, f"vqa-{number:06d}", "caption" if number % 3 == 2 else "vqa", fields)


def _base(each: RawRecord) -> results.Row:
    return {
        "index": each.index, "edit_id": each.edit_id, "file": each.file, "task": each.task, "fact": each.edit_id,
        "prompt": each.fields["src"], "target": each.fields["alt"], "editor": "ftl", "objective": "native",
    }  # fmt: skip


def edited_row(each: RawRecord) -> results.Row:
    """The row of an edit that holds unless its number is divisible by four; its last probe is worse than the others."""
    number, old, new = each.index, each.fields["pred"], each.fields["alt"]
    holds = float(number % 4 > 0)
    row: dict[str, Any] = _base(each) | {"status": results.EDITED, "steps": 10 + number % 7, "seconds": 0.25}
    row |= {"stop_reason": "max_steps", "worst_nll": 0.1 * (number % 9), "answer_before": old}
    row |= {"answer_after": new if holds else old, "losses": {"rel": [3.0, 1.0, 0.5], "own": [0.0, 0.0, 0.0]}}
    answers: dict[str, dict[str, str]] = {}
    for probe in PROBES:
        is_locality = "loc" in probe
        right = holds if probe in ("rel", "t_gen") else float(number % 5 > 0)
        row[probe] = right
        row[column(probe, "generated_exact")] = right
        if is_locality:
            answers[probe] = {"before": "red", "after": "red" if right else "blue"}
        else:
            row[column(probe, "generated_exact", "before")] = 0.0
            answers[probe] = {"before": old, "after": new if right else old}
    # The plain column of a probe with a near one is the mean of both.
    row[column("m_loc", FAR)], row[f"{column('m_loc', FAR)}_generated_exact"] = row["m_loc"], row["m_loc"]
    return row | {"answers": answers}
