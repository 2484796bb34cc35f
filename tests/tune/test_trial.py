"""Trials in this process, without Ray: reuse of the model, resumption and scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from odedit.data.records import RawRecord
from odedit.evaluation.statistics import MAIN
from pipeline.run_folder import rows
from pipeline.run_folder.workspace import Workspace, read_json
from pipeline.workers import model
from pipeline.workers.plan import Job
from tune import rungs as records
from tune import scoring
from tune.config import check, from_values
from tune.folder import Folder
from tune.run import _prepared
from tune.space import key_of
from tune.trainable import EDITS, JUDGED, EditTrial


def trial_of(values: dict[str, Any], folder: Path, point: dict[str, Any]) -> EditTrial:
    """A trial as Tune sets it up, but in this process."""
    search = check(from_values(values))
    place = Folder.of(folder)
    base, found = _prepared(search, place, Console(quiet=True))
    rungs = records.stage(base, found, place.validation, search.config.rungs.sizes, 0)
    trial = EditTrial.__new__(EditTrial)
    job = Job(base, found, Workspace(place.validation))
    trial.setup(config_of(point), job, rungs, search.config.rungs.sizes, place.out, search.config.judged_by)
    return trial


def config_of(point: dict[str, Any]) -> dict[str, Any]:
    return {"key": key_of(point), "settings": point}


def parts(folder: Path, point: dict[str, Any]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "trials" / key_of(point) / "results").iterdir()}


def test_a_trial_goes_rung_by_rung_and_the_next_one_finds_the_model_loaded(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    original = model.load_with_feature_cache

    def load(*arguments: Any, **named: Any) -> Any:
        loads.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(model, "load_with_feature_cache", load)
    monkeypatch.setattr(model, "_loaded", {})
    first, second = {"editor.learning_rate": 1e-3}, {"editor.learning_rate": 2e-3}
    trial = trial_of(values, tmp_path / "out", first)
    said = [trial.step() for _ in range(3)]
    assert [result[EDITS] for result in said] == [2, 4, 8] and [result["done"] for result in said] == [
        False,
        False,
        True,
    ]
    assert all(result[JUDGED] == result_report(result)["score"] and not result["error"] for result in said)
    assert trial.reset_config(config_of(second))
    assert trial.step()[EDITS] == 2
    assert len(loads) == 1
    assert len(parts(tmp_path / "out", first)) == 4 and len(parts(tmp_path / "out", second)) == 1


def result_report(result: dict[str, Any]) -> dict[str, Any]:
    import json

    return dict(json.loads(result["report"]))


def test_a_trial_that_is_taken_up_again_goes_on_behind_its_last_group(values: dict[str, Any], tmp_path: Path) -> None:
    point = {"editor.learning_rate": 1e-3}
    out = tmp_path / "out"
    trial = trial_of(values, out, point)
    first, second = trial.step(), trial.step()
    workspace = Workspace.of(out / "trials" / key_of(point))
    third = trial._rungs[2][0]
    trial._edit(third)  # killed in the middle of the last rung
    before = parts(out, point)
    again = trial_of(values, out, point)
    assert again.step() == second, "the last report may not have reached the sampler"
    last = again.step()
    assert last["done"] and last[EDITS] == 8 and first[EDITS] == 2
    after = parts(out, point)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert read_json(workspace.out / "rung-2.json") == result_report(last)
    finished = trial_of(values, out, point)
    assert finished.step() == last


def test_settings_that_do_not_fit_the_model_end_the_trial_with_a_sentence(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["space"] = {"editor.sites": {"choices": [["layers.2.ffn.out"], ["layers.9.ffn.out"]]}}
    result = trial_of(values, tmp_path / "out", {"editor.sites": ["layers.9.ffn.out"]}).step()
    assert result["done"] and "layers.9.ffn.out" in result["error"] and "report" not in result


def test_edits_that_all_fail_end_the_trial_too(values: dict[str, Any], tmp_path: Path) -> None:
    values["settings"]["editor"] = {"name": "outside_tuned.fragile", "sites": ["layers.2.ffn.out"], "max_steps": 2}
    values["space"] = {"editor.mode": {"choices": ["well", "raise"]}}
    values["settings"]["objective"] = {"name": "native", "own_weight": 1.0}
    result = trial_of(values, tmp_path / "out", {"editor.mode": "raise"}).step()
    assert (
        result["done"] and "none of the edits worked" in result["error"] and "a number that is none" in result["error"]
    )
    assert result[JUDGED] == 0.0


def test_a_failed_edit_counts_as_nought() -> None:
    good = {"status": rows.EDITED, **dict.fromkeys(MAIN, 1.0), "steps": 2}
    found = scoring.report([good, {"status": rows.FAILED}, {"status": rows.SKIPPED}], 3)
    assert found["score"] == found["locality"] == found["rel"] == 0.5 and found["failed"] == 1
    assert found["steps"] == 2


def test_every_beginning_of_the_records_is_as_varied_as_it_can_be() -> None:
    of = [("vqa", fact) for fact in "aaabbbccc"] + [("caption", fact) for fact in "ddd"]
    every = [RawRecord("f", n, f"edit-{n}", task, {"fact": fact}) for n, (task, fact) in enumerate(of)]
    chosen = records.ordered(every, seed=1)
    assert sorted(record.edit_id for record in chosen) == sorted(record.edit_id for record in every)
    assert {record.fields["fact"] for record in chosen[:4]} == set("abcd")
    for end in (4, 8, 12):
        assert sum(record.task == "caption" for record in chosen[:end]) == end // 4
    assert records.ordered(every[::-1], seed=1) == chosen != records.ordered(every, seed=2)
