"""Checks of the folder of a run that survived a fault: no record lost, no file damaged, none left over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pyarrow import parquet

from odedit.editing.files import load_edit
from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace
from tests.faults.bench import EDITS, Bench


@dataclass(frozen=True)
class Faced:
    """A finished run that met a fault.

    Attributes:
        out: Folder of the run.
        seconds: Duration of all its commands.
        undisturbed: Duration of the same run without the fault, in seconds.
        given_up: Edits that cause the fault, whose rows are failed.
        as_with: Setting per edit that was made in a smaller batch, which changes its last bits. The undisturbed run
            with that setting makes it in the same batch.
    """

    out: Path
    seconds: float
    undisturbed: float
    given_up: frozenset[str] = frozenset()
    as_with: Mapping[str, str] = field(default_factory=dict)


def lost(bench: Bench, faced: Faced) -> list[str]:
    """Ids of the records whose row is missing or differs from the undisturbed run's."""
    rows = {row["edit_id"]: row for row in rows_of(faced.out)}
    lost = []
    for edit_id in bench.ids:
        row, expected = rows.get(edit_id), _expected(bench, faced, edit_id)
        if edit_id in faced.given_up:
            is_well = row is not None and row["status"] == results.FAILED and bool(row["error"])
        else:
            is_well = row is not None and results.to_json_row(row) == results.to_json_row(expected)
        lost += [] if is_well else [edit_id]
    return lost


def check(bench: Bench, faced: Faced) -> None:
    """Raises AssertionError unless every record has exactly one row, every edit's tensors equal the undisturbed run's,
    every file can be read, and no other file is left.
    """
    assert [row["edit_id"] for row in rows_of(faced.out)] == bench.ids
    assert lost(bench, faced) == []
    edited = [edit_id for edit_id in bench.ids[:EDITS] if edit_id not in faced.given_up]
    for edit_id in edited:
        reference = bench.reference(*filter(None, [faced.as_with.get(edit_id)]))
        expected, expected_info = load_edit(Workspace.of(str(reference)).edit(edit_id))
        params, info = load_edit(Workspace.of(str(faced.out)).edit(edit_id))
        # A run in object storage has its pictures there, the undisturbed run on disk.
        assert replace(expected_info, image_root=info.image_root) == info, edit_id
        assert expected.keys() == params.keys(), edit_id
        assert all(torch.equal(expected[name], params[name]) for name in expected), edit_id
    _check_files(faced.out, edited)


def _check_files(out: Path, edited: list[str]) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n"] == len(edited)
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    assert isinstance(json.loads((out / "run.json").read_text()), dict)
    assert isinstance(yaml.safe_load((out / "config.yaml").read_text()), dict)
    for path in (out / "records.parquet", *(out / "results").iterdir()):
        parquet.ParquetFile(path, page_checksum_verification=True).read()
    assert {path.name for path in (out / "edits").iterdir()} == {f"{edit_id}.safetensors" for edit_id in edited}
    assert not list((out / "attempts").iterdir()) and not list(out.rglob("*.tmp"))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return list(results.read_rows(results.parts(Workspace.of(str(out)))))


def _expected(bench: Bench, faced: Faced, edit_id: str) -> dict[str, Any]:
    reference = bench.reference(*filter(None, [faced.as_with.get(edit_id)]))
    (row,) = [row for row in rows_of(reference) if row["edit_id"] == edit_id]
    return row
