"""Whole runs in this process: a row per record, failures stay local, a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from outside_editors.poisoned import WorkerDeath

from odedit.editing.files import load_edit
from odedit.errors import InputError
from odedit.evaluation.statistics import MAIN
from odedit.runtime.peak_memory import Peak
from pipeline.config.run import from_dict
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows as results
from pipeline.workers import editor as actor
from tests.support.mmedit_files import encoded, picture, record, write_array
from tests.support.rows import assert_same

Inline = Callable[..., Outcome]


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    return list(results.read_rows(results.parts(outcome.workspace)))


def poisoned(settings: dict[str, Any], ids: list[str]) -> dict[str, Any]:
    records = [record(number, edit_id=edit_id) for number, edit_id in enumerate(ids)]
    write_array(Path(settings["data"]["path"]), records)
    editor = {"name": "outside_editors.poisoned", "sites": ["layers.2.ffn.in"], "max_steps": 2}
    return settings | {"editor": editor, "objective": {"name": "native"}, "pipeline": {"batch_size": 8}}


def test_every_record_has_a_row_and_every_edit_a_file(settings: dict[str, Any], inline: Inline) -> None:
    outcome = inline(from_dict(settings))
    rows = rows_of(outcome)
    assert [row["index"] for row in rows] == list(range(5))
    for row in rows:
        assert row["status"] == results.EDITED
        assert all(0 <= row[metric] <= 1 for metric in MAIN)
        assert (row["editor"], row["objective"], row["backbone"]) == ("wise", "odedit", "blip2:embedded")
        assert row["steps"] + 1 == len(row["losses"]["rel"]), "no step is taken after the last evaluation"
        assert 0 < row["rephrase_distance"] < 1 and "peak_bytes" not in row
        assert row["penalty_steps"] == sum(value > 0 for value in row["losses"]["lambda"])
        _, info = load_edit(outcome.workspace.edit(row["edit_id"]))
        assert info.metrics["rel"] == row["rel"]
    assert sum(row["penalty_steps"] for row in rows) > 0
    summary = json.loads(outcome.workspace.summary.read_text())
    assert (summary["n"], sum(summary["stop_reasons"].values())) == (5, 5)
    assert "wise" in outcome.workspace.config.read_text()
    assert not outcome.workspace.attempts.names()
    assert "http" not in (outcome.workspace.out / "report.html").read_text().replace("http-equiv", "")


def test_bad_records_and_pictures_become_rows_and_the_others_are_edited(
    settings: dict[str, Any], inline: Inline
) -> None:
    records = [record(number) for number in range(5)] + [record(9, src=3), "text", record(10, image="../x.jpg")]
    write_array(Path(settings["data"]["path"]), records)
    root = Path(settings["data"]["image_root"])
    (root / records[0]["image"]).unlink()
    (root / records[1]["image"]).write_bytes(encoded(picture(1), "JPEG")[:60])
    outcome = inline(from_dict(settings))
    rows = rows_of(outcome)
    assert [row["status"] for row in rows] == [
        "skipped",
        "skipped",
        "edited",
        "edited",
        "edited",
        "skipped",
        "skipped",
        "skipped",
    ]
    assert "record 0" in rows[0]["error"] and "is not under data.image_root" in rows[0]["error"]
    assert (outcome.summary["n"], outcome.summary["skipped"]) == (3, 5)


def test_a_failed_edit_is_a_row_and_leaves_its_batch_alone(settings: dict[str, Any], inline: Inline) -> None:
    alone = rows_of(inline(from_dict(poisoned(settings, ["good-1", "good-2"]))))
    other = settings | {"out": settings["out"] + "-2"}
    rows = {row["edit_id"]: row for row in rows_of(inline(from_dict(poisoned(other, ["good-1", "good-2", "nan-1"]))))}
    assert rows["nan-1"]["status"] == results.FAILED
    assert "record 2" in rows["nan-1"]["error"]
    assert rows["nan-1"]["rel"] is None
    for row in alone:
        assert rows[row["edit_id"]]["losses"]["rel"] == pytest.approx(row["losses"]["rel"], abs=1e-4)


def test_an_exception_costs_one_edit_in_one_sentence(settings: dict[str, Any], inline: Inline) -> None:
    outcome = inline(from_dict(poisoned(settings, ["good-1", "raise-1", "good-2"])))
    rows = rows_of(outcome)
    assert [row["status"] for row in rows] == ["edited", "failed", "edited"]
    assert rows[1]["error"].endswith("record 1: ArithmeticError: a number that is none")
    assert "Traceback" in (outcome.workspace.out / "errors" / "raise-1.txt").read_text()


def test_a_batch_that_does_not_fit_is_halved(settings: dict[str, Any], inline: Inline) -> None:
    rows = rows_of(inline(from_dict(poisoned(settings, ["large-1", "large-2", "large-3"]))))
    assert [row["status"] for row in rows] == ["edited"] * 3


def test_an_edit_that_kills_its_worker_is_given_up(settings: dict[str, Any], inline: Inline) -> None:
    config = from_dict(poisoned(settings, ["good-1", "die-1", "good-2"]))
    for _ in range(3):
        with pytest.raises(WorkerDeath):
            inline(config)
    rows = rows_of(inline(config))
    assert [row["status"] for row in rows] == ["edited", "failed", "edited"]
    assert "given up: its worker died in each of 3 attempts" in rows[1]["error"]


def test_a_resumed_run_equals_an_uninterrupted_one(settings: dict[str, Any], inline: Inline) -> None:
    whole = inline(from_dict(settings))
    expected = rows_of(whole)
    out = Path(settings["out"])
    # As after a kill in the second group: begun, some edits written, no rows.
    whole.workspace.part(1).delete()
    (out / "attempts" / "group-000001.json").write_text('{"whole": 1, "single": {}}')
    (out / "results" / ".part-000001.parquet.host.1.tmp").write_bytes(b"half")
    before = whole.workspace.part(0).info().mtime_ns
    again = inline(from_dict(settings))
    assert_same(rows_of(again), expected)
    assert again.workspace.part(0).info().mtime_ns == before


def test_a_finished_run_is_not_repeated_and_another_one_is_refused(settings: dict[str, Any], inline: Inline) -> None:
    first = inline(from_dict(settings))
    assert inline(from_dict(settings)).summary["metrics"] == first.summary["metrics"]
    changed = settings | {"editor": settings["editor"] | {"max_steps": 3}}
    with pytest.raises(InputError, match=r"editor\.max_steps: was 2, now 3") as caught:
        inline(from_dict(changed))
    assert "--fresh" in str(caught.value)
    path = Path(settings["data"]["path"])
    path.write_text(path.read_text() + " ")
    with pytest.raises(InputError, match=r"data\.path: was"):
        inline(from_dict(settings))


def test_the_number_of_workers_may_change_between_resumed_runs(settings: dict[str, Any], inline: Inline) -> None:
    first = inline(from_dict(settings))
    moved = settings | {"pipeline": {"batch_size": 2, "actors": 3, "max_attempts": 5}}
    assert inline(from_dict(moved)).summary["n"] == first.summary["n"]


def test_results_without_their_run_are_not_overwritten(settings: dict[str, Any], inline: Inline) -> None:
    outcome = inline(from_dict(settings))
    outcome.workspace.run.delete()
    with pytest.raises(InputError, match=r"without run\.json"):
        inline(from_dict(settings))
    shutil.rmtree(outcome.workspace.out)
    inline(from_dict(settings))


def test_measured_memory_is_a_column_and_changes_nothing_else(
    settings: dict[str, Any], tmp_path: Path, inline: Inline
) -> None:
    plain = rows_of(inline(from_dict(settings)))
    measured = settings | {"out": str(tmp_path / "measured"), "pipeline": {"batch_size": 2, "measure_memory": True}}
    rows = rows_of(inline(from_dict(measured)))
    peaks = [row.pop("peak_bytes") for row in rows]
    assert [results.to_json_row(row) for row in rows] == [results.to_json_row(row) for row in plain]
    assert peaks[0] == peaks[1] > 0, "the edits of a batch share its peak"


def test_memory_is_measured_on_a_short_edit_of_its_own_without_warmup(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int | None, bool, float]] = []
    inside = False
    original_edit, original_peak = actor.edit, actor.peak_memory

    @contextmanager
    def peak_memory(device: str) -> Iterator[Peak]:
        nonlocal inside
        inside = True
        with original_peak(device) as peak:
            yield peak
        inside = False

    def edit(*arguments: Any) -> Any:
        calls.append((arguments[4].max_steps, inside, arguments[2].config.warmup))
        return original_edit(*arguments)

    monkeypatch.setattr(actor, "edit", edit)
    monkeypatch.setattr(actor, "peak_memory", peak_memory)
    changed = {
        "objective": {"sigma2_0": 10.0, "warmup": 0.2},
        "stopping": {"max_steps": 5, "worst_token_nll": 1e-9},
        "data": settings["data"] | {"limit": 2},
        "pipeline": {"batch_size": 2, "at_once": 2, "measure_memory": True},
    }
    rows = rows_of(inline(from_dict(settings | changed)))
    assert [row["steps"] for row in rows] == [5] * 2
    assert calls == [(5, False, 0.2), (3, True, 0.0)]


def test_no_later_step_needs_more_memory_than_the_measured_ones(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = []
    for steps in (actor.MEASURED_STEPS, 6):
        monkeypatch.setattr(actor, "MEASURED_STEPS", steps)
        changed = {
            "objective": {"sigma2_0": 10.0},
            "stopping": {"max_steps": 6, "worst_token_nll": 1e-9},
            "data": settings["data"] | {"limit": 1},
            "pipeline": {"batch_size": 2, "at_once": 2, "measure_memory": True},
            "out": f"{settings['out']}-{steps}",
        }
        peaks.append(rows_of(inline(from_dict(settings | changed)))[0]["peak_bytes"])
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_a_question_longer_than_the_model_takes_fails_alone(settings: dict[str, Any], inline: Inline) -> None:
    records = [record(number) for number in range(3)]
    records[1]["src"] = "what is it " * 200
    write_array(Path(settings["data"]["path"]), records)
    rows = rows_of(inline(from_dict(settings | {"objective": {"name": "odedit"}, "data": settings["data"]})))
    assert [row["status"] for row in rows] == ["edited", "failed", "edited"]
    assert "tokens are more than the" in rows[1]["error"] and "positions that the text model takes" in rows[1]["error"]
