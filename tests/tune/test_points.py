"""Points in Optuna's storage: each asked for and reported once, and restored after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console

from odedit.errors import InputError
from tune import points
from tune.config import SearchConfig, check, from_values
from tune.points import COMPLETE, FAILED, PRUNED, RUNNING, Points
from tune.run import run
from tune.search import JUDGED, scheduler


def opened(values: dict[str, Any], out: Path, search_id: str = "one") -> Points:
    out.mkdir(exist_ok=True)
    search = check(from_values(values))
    return Points(search.config, search.space, out, search_id, "study")


def said(edits: int, score: float, **more: float) -> dict[str, Any]:
    return {"edits": edits, "score": score, **more}


def test_a_search_goes_on_with_the_trials_that_were_running(values: dict[str, Any], tmp_path: Path) -> None:
    asked = opened(values, tmp_path / "out")
    first, second, third = (asked.ask() for _ in range(3))
    assert first and second and third
    assert first.point == {"editor.learning_rate": 2e-4}, "the defaults come first"
    asked.report(first, said(2, 0.5))
    asked.finish(first, COMPLETE)
    asked.report(second, said(2, 0.25))
    again = opened(values, tmp_path / "out")
    assert again.ask() == points.Trial(second.number, second.key, second.point, RUNNING, {2: said(2, 0.25)})
    assert again.ask() == third
    again.report(second, said(2, 0.75))
    again.finish(second, PRUNED)
    again.finish(third, FAILED, "no s3://me:secret@host here")
    last = again.ask()
    assert last and again.ask() is None, "as many as were asked for"
    again.report(last, said(8, 0.9))
    again.finish(last, COMPLETE)
    again.finish(last, FAILED)  # a closed trial stays as it is
    assert opened(values, tmp_path / "out").ask() is None
    more = opened(values | {"trials": 6}, tmp_path / "out")
    proposed = [trial.key for trial in (more.ask(), more.ask()) if trial]
    assert len({first.key, second.key, third.key, last.key, *proposed}) == 6, "another seed every time"

    # Optuna's own tools read the study.
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "out" / "optuna.journal")))
    study = optuna.load_study(study_name="study", storage=storage)
    assert [trial.state for trial in study.trials[:4]] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert study.best_trial.number == last.number and study.best_params == last.point
    assert study.trials[1].intermediate_values == {2: 0.25}, "what was said first stays"
    assert study.trials[2].user_attrs["error"] == "no s3://***@host here"


def test_a_trial_that_was_killed_before_its_point_was_whole_does_not_count(
    values: dict[str, Any], tmp_path: Path
) -> None:
    asked = opened(values, tmp_path / "out")
    asked.study.ask()
    again = opened(values, tmp_path / "out")
    trial = again.ask()
    assert trial and trial.number == 1 and [one.number for one in again.trials()] == [1]
    assert again.study.trials[0].state == TrialState.FAIL


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_no_point_twice_and_an_end_where_there_are_no_others(
    sampler: str, values: dict[str, Any], tmp_path: Path
) -> None:
    space = {"editor.max_steps": {"low": 1, "high": 3}, "objective.name": {"choices": ["native", "native_kl"]}}
    asked = opened(values | {"space": space, "trials": 50, "sampler": sampler, "concurrent": 1}, tmp_path / "out")
    tried = []
    while (trial := asked.ask()) is not None:
        tried.append(trial)
        asked.report(trial, said(2, len(tried) / 10))
        asked.finish(trial, COMPLETE)
    assert len(tried) == len({trial.key for trial in tried}) == len(asked.trials()) == 6


def test_several_objectives_have_a_front(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"objectives": ["generality", "locality"], "sampler": "nsga2", "trials": 5}
    asked = opened(values, tmp_path / "out")
    for pair in ((0.9, 0.1), (0.5, 0.5), (0.4, 0.4), (0.1, 0.9), None):
        trial = asked.ask()
        assert trial
        if pair is not None:
            asked.report(trial, said(8, min(pair), generality=pair[0], locality=pair[1]))
        asked.finish(trial, PRUNED if pair is None else COMPLETE)
    config = from_values(values)
    assert [trial.number for trial in points.pareto(asked.trials(), config.objectives)] == [0, 1, 3]
    best = points.best(asked.trials(), config)
    assert best is not None and best.number == 1
    assert {trial.number for trial in asked.study.best_trials} == {0, 1, 3}


def test_of_equal_trials_the_first_is_the_best() -> None:
    every = [points.Trial(number, str(number), {}, COMPLETE, {8: said(8, 0.5)}) for number in range(3)]
    best = points.best([*every, points.Trial(3, "3", {}, PRUNED, {2: said(2, 0.9)})], SearchConfig())
    assert best is every[0]
    assert points.best([], SearchConfig()) is None


def test_halving_has_heard_of_the_earlier_trials(values: dict[str, Any]) -> None:
    from types import SimpleNamespace

    search = check(from_values(values))
    earlier = [points.Trial(n, str(n), {}, COMPLETE, {2: said(2, 0.8), 4: said(4, 0.8)}) for n in range(2)]
    halving = scheduler(search, earlier)
    trial: Any = SimpleNamespace(config={"key": "new"})
    halving.on_trial_add(None, trial)
    assert halving.on_trial_result(None, trial, {"edits": 2, JUDGED: 0.5}) == "STOP"
    other: Any = SimpleNamespace(config={"key": "other"})
    halving.on_trial_add(None, other)
    assert halving.on_trial_result(None, other, {"edits": 2, JUDGED: 0.9}) == "CONTINUE"
    alone = check(from_values(values | {"rungs": {"edits": 8, "number": 1}}))
    assert type(scheduler(alone, [])).__name__ == "FIFOScheduler"


def test_a_storage_that_cannot_be_used_is_explained(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "text.db").write_text("this is no database" * 100)
    for storage in (
        str(tmp_path / "file" / "optuna.journal"),
        f"sqlite:///{tmp_path}/none/there/optuna.db",
        f"sqlite:///{tmp_path}/text.db",
        "nosuch://me:secret@host/name",
        "postgresql+psycopg://me:secret@127.0.0.1:1/name",
    ):
        with pytest.raises(InputError, match="^storage: ") as raised:
            opened(values | {"storage": storage}, tmp_path / "out")
        assert "secret" not in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_missing_driver_is_named_before_anything_is_written(values: dict[str, Any], tmp_path: Path) -> None:
    for storage in ("oracle://me:secret@host/name", "nosuch://me:secret@host/name", "mysql://me:secret@host/name"):
        with pytest.raises(
            InputError, match=r"^storage: '\w+://\*\*\*@host/name' cannot be used \(.*postgresql\+psycopg:"
        ):
            run(from_values(values | {"storage": storage}), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()
    for storage in (None, "journal", "sqlite:///x", "postgresql+psycopg://me@host/name"):
        points.check_driver(from_values(values | {"storage": storage}))


def test_a_database_keeps_searches_apart(values: dict[str, Any], tmp_path: Path) -> None:
    values["storage"] = f"sqlite:///{tmp_path}/optuna.db"
    trial = opened(values, tmp_path / "out").ask()
    assert trial and opened(values, tmp_path / "out").ask() == trial
    assert optuna.load_study(study_name="study", storage=values["storage"]).trials[0].params == trial.point
    with pytest.raises(InputError, match="belongs to another search"):
        opened(values, tmp_path / "out", "two")
