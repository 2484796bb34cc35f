"""Eight processes that log searches to one MLflow store at once: a sqlite file, and a server."""

from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder.curves import Curve
from pipeline.tracking.client import PARENT_TAG
from pipeline.tracking.connection import connect
from pipeline.tracking.searches import POINT, SearchRun
from tests.support.services import PATIENCE_S, database, server
from tune.config import check, from_values
from tune.points import COMPLETE, Points

WRITERS, TRIALS, RUNGS = 8, 3, (2, 4, 8)


def write(uri: str, writer: int) -> None:
    """Logs a search whose figures depend on the writer's number."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    search = SearchRun.start(uri, "together", f"search {writer}", f"id-{writer}", {"writer": writer}, {}, None)
    values = list(map(float, range(50)))
    curve = Curve(range(50), values, values, values)
    for trial in range(TRIALS):
        key = f"{writer}-{trial}"
        search.open_trial(key, trial, {f"setting.{name}": trial for name in range(20)}, {})
        for edits in RUNGS:
            search.log_rungs(key, {edits: {"edits": edits, "score": writer + trial / 10 + edits / 1000}})
        search.close_trial(key, "complete", {}, {}, {"rel": curve})
    search.log_search([], {"best": float(writer)}, {"best.trial": "0"}, "")
    search.end()
    assert search.failed is None, search.failed


def check_together(uri: str) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "pipeline.tracking.searches"])
    processes = [context.Process(target=write, args=(uri, writer)) for writer in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * WRITERS
    client = connect(uri)
    experiment = client.get_experiment_by_name("together").experiment_id
    every = client.search_runs([experiment], max_results=1000)
    assert len(every) == WRITERS * (1 + TRIALS)
    assert {run.info.status for run in every} == {"FINISHED"}
    parents = {run.info.run_id: run for run in every if PARENT_TAG not in run.data.tags}
    assert sorted(run.data.metrics["best"] for run in parents.values()) == list(map(float, range(WRITERS)))
    children = {run.data.tags[POINT]: run for run in every if PARENT_TAG in run.data.tags}
    assert len(children) == WRITERS * TRIALS
    for key, run in children.items():
        writer, trial = map(int, key.split("-"))
        assert parents[run.data.tags[PARENT_TAG]].data.params["writer"] == str(writer)
        assert len(run.data.params) == 20
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "score")}
        assert points == {edits: pytest.approx(writer + trial / 10 + edits / 1000) for edits in RUNGS}
        assert len(client.get_metric_history(run.info.run_id, "training/curves/rel")) == 50


def test_eight_writers_of_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    check_together(f"sqlite:///{tmp_path}/mlflow.db")


def test_eight_writers_through_a_server(tmp_path: Path) -> None:
    with database(tmp_path) as backend, server(backend, tmp_path) as uri:
        check_together(uri)


def test_a_trial_whose_end_was_interrupted_is_not_closed_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's state is logged, its run is not ended."""
    search = SearchRun.start(f"sqlite:///{tmp_path}/mlflow.db", "cut off", "search", "id", {}, {}, None)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for key, number, state, status in (("one", 0, "complete", "FINISHED"), ("two", 1, "failed", "FAILED")):
        search.open_trial(key, number, {}, {})
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(search.store.client, "set_terminated", interrupt)
            search.close_trial(key, state, {}, {}, {})
        search.end(KeyboardInterrupt())
        assert search.store.run(search.trials[key].run_id).info.status == "KILLED" and not search.is_closed(key)
        search.open_trial(key, number, {}, {})
        search.close_trial(key, state, {}, {}, {})
        assert search.store.run(search.trials[key].run_id).info.status == status and search.is_closed(key)


def test_a_search_kept_in_the_database_goes_on(values: dict[str, Any], tmp_path: Path) -> None:
    with database(tmp_path) as address:
        search = check(from_values(values | {"storage": address}))
        asked = Points(search.config, search.space, tmp_path, "id", "study")
        first, second = asked.ask(), asked.ask()
        assert first and second
        asked.report(first, {"edits": 8, "score": 0.5})
        asked.finish(first, COMPLETE)
        again = Points(search.config, search.space, tmp_path, "id", "study")
        assert again.ask() == second and [trial.state for trial in again.trials()] == ["complete", "running"]
