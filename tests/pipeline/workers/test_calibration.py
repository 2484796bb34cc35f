"""Measurements before the first edit: on usable records, and only if there is a record to edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from odedit.data.pack import pack
from odedit.editors.tpatcher import TPatcher
from odedit.errors import InputError
from odedit.inputs.batch import EditBatch
from pipeline.config.run import from_dict
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows as results
from tests.support.mmedit_files import record, write_array, write_images

Inline = Callable[..., Outcome]


def test_a_packed_pool_is_read_with_its_own_pictures(settings: dict[str, Any], inline: Inline, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    records = [record(number) for number in range(20, 23)]
    roots = write_images(folder, records)
    pack(str(write_array(folder / "train.json", records)), str(roots[0]), str(roots[1]), str(folder / "packed"))
    outcome = inline(from_dict(settings | {"data": settings["data"] | {"pool": str(folder / "packed"), "limit": 1}}))
    measured = json.loads(outcome.workspace.calibration.read_text())
    assert (measured["source"], measured["records"]) == ("pool", 3)
    assert outcome.summary["n"] == 1


@pytest.mark.parametrize("positions", ["target", "text"])
def test_the_number_of_states_is_the_measured_one(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    from odedit.risks import mmd

    seen = []
    measure = mmd.mean_squared_distance
    monkeypatch.setattr(mmd, "mean_squared_distance", lambda states: seen.append(len(states)) or measure(states))
    outcome = inline(from_dict(settings | {"objective": {"positions": positions}}))
    measured = json.loads(outcome.workspace.calibration.read_text())
    assert (measured["source"], measured["records"], [measured["states"]]) == ("records", 5, seen)


def test_without_a_usable_calibration_record_the_first_problem_is_in_the_message(
    settings: dict[str, Any], inline: Inline, tmp_path: Path
) -> None:
    pool = write_array(tmp_path / "pool.json", [record(number) for number in range(50, 53)])
    with pytest.raises(InputError, match=r"data\.pool: no calibration record can be used; first: pool\.json, record"):
        inline(from_dict(settings | {"data": settings["data"] | {"pool": str(pool)}}))


def test_a_run_without_anything_to_edit_ends_with_its_skipped_rows(
    settings: dict[str, Any], inline: Inline, tmp_path: Path
) -> None:
    for path in (tmp_path / "coco").rglob("*.jpg"):
        path.write_text("no picture")
    outcome = inline(from_dict(settings))
    rows = list(results.read_rows(results.parts(outcome.workspace)))
    assert [row["status"] for row in rows] == ["skipped"] * 5
    assert not outcome.workspace.calibration.exists()

    write_array(Path(settings["data"]["path"]), [{"src": 1}, "text", record(1, alt="")])
    outcome = inline(from_dict(settings | {"out": settings["out"] + "-2"}))
    assert (outcome.summary["n"], outcome.summary["skipped"]) == (0, 3)
    assert (outcome.workspace.out / "report.html").exists()


def test_records_beyond_the_first_unusable_ones_are_measured(
    settings: dict[str, Any], inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.workers import calibration

    monkeypatch.setattr(calibration, "CALIBRATION_RECORDS", 2)
    records = json.loads(Path(settings["data"]["path"]).read_text())
    for broken in records[:3]:
        (tmp_path / "coco" / broken["image"]).unlink()
    outcome = inline(from_dict(settings))
    assert json.loads(outcome.workspace.calibration.read_text())["records"] == 2
    assert (outcome.summary["n"], outcome.summary["skipped"]) == (2, 3)


def test_an_editor_is_measured_on_nothing_that_is_scored(
    settings: dict[str, Any], inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    measure = TPatcher.measured

    def measured(self: TPatcher, backbone: Any, batch: EditBatch) -> TPatcher:
        seen.append(batch.edit_ids)
        return measure(self, backbone, batch)

    monkeypatch.setattr(TPatcher, "measured", measured)
    values = settings | {"editor": {"name": "tpatcher", "max_steps": 1}, "objective": {"name": "native"}}
    assert inline(from_dict(values)).summary["n"] == 5
    assert not seen, "without a pool, every record is scored"

    scored = json.loads(Path(settings["data"]["path"]).read_text())
    asks = record(30, edit_id="asks", loc=f" {scored[4]['loc'].upper()} ")
    shows = record(31, edit_id="shows", m_loc=scored[0]["image"])
    pool = [record(32, edit_id="one"), asks, scored[1] | {"edit_id": "scored"}, shows, record(33, edit_id="two")]
    write_images(tmp_path, [record(number) for number in range(30, 34)])
    values["data"] = settings["data"] | {"pool": str(write_array(tmp_path / "pool.json", pool))}
    assert inline(from_dict(values | {"out": settings["out"] + "-2"})).summary["n"] == 5
    assert sorted(seen[0]) == ["one", "two"] and len(seen) == 1
