"""What has to be true of a run's folder once the run has come through: nothing lost, nothing else, nothing half."""

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
    """A run that met a fault and was finished all the same.

    Attributes:
        seconds: Of all its commands together.
        undisturbed: Seconds of the same run without the fault.
        given_up: Edits that it could not make because they are the fault; their rows say why.
        as_with: Edits that were made in a smaller batch, which changes the last bits, and the settings under which the
            undisturbed run makes them in the same.
    """

    out: Path
    seconds: float
    undisturbed: float
    given_up: frozenset[str] = frozenset()
    as_with: Mapping[str, str] = field(default_factory=dict)


def lost(bench: Bench, faced: Faced) -> list[str]:
    """The records without a row, or without the edit that an undisturbed run makes of them."""
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
    """Raises AssertionError unless every record has exactly one row, every edit's tensors are those of the undisturbed
    run, every file can be read, and none is left over.
    """
    assert [row["edit_id"] for row in rows_of(faced.out)] == bench.ids
    assert lost(bench, faced) == []
    edited = [edit_id for edit_id in bench.ids[:EDITS] if edit_id not in faced.given_up]
    for edit_id in edited:
        reference = bench.reference(*filter(None, [faced.as_with.get(edit_id)]))
        expected, found = (load_edit(Workspace.of(str(out)).edit(edit_id)) for out in (reference, faced.out))
        # The pictures of a run in storage lie somewhere else than those of the undisturbed one.
        assert replace(expected[1], image_root=found[1].image_root) == found[1], edit_id
        assert expected[0].keys() == found[0].keys(), edit_id
        assert all(torch.equal(expected[0][name], found[0][name]) for name in expected[0]), edit_id
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
