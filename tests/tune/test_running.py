"""Reports of trials in the driver, without Ray: passed to Optuna, MLflow and the terminal, also after failures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.tracking.client import TrackingError
from pipeline.tracking.connection import connect
from pipeline.tracking.searches import KIND, STATE, SearchRun
from tune.config import check, from_values
from tune.points import Points
from tune.search import Asking, Running


class Search:
    """A search whose trials are simulated by the test."""

    def __init__(self, values: dict[str, Any], out: Path) -> None:
        self.uri = f"sqlite:///{out}/mlflow.db"
        self.search = check(from_values(values))
        self.tracker = SearchRun.start(self.uri, "test", "search", "id", {"trials": 2}, {}, None)
        self.asked = Points(self.search.config, self.search.space, out, "id", "study")
        self.text = io.StringIO()
        console = Console(file=self.text, width=200)
        self.running = Running(self.search, self.asked, out, self.tracker, console)

    def report(self, trial_id: str, edits: int, score: float) -> None:
        said = {"edits": edits, "score": score, "failed": 0}
        self.running.report(trial_id, {"report": json.dumps(said)})

    def runs(self) -> list[Any]:
        client = connect(self.uri)
        experiment = client.get_experiment_by_name("test").experiment_id
        return [run for run in client.search_runs([experiment]) if run.data.tags[KIND] == "trial"]


def test_a_store_that_is_gone_for_a_while_misses_nothing(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(values | {"trials": 2}, tmp_path)
    client = search.tracker.store.client
    assert search.running.ask("a")

    def gone(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        for name in ("log_batch", "create_run", "update_run", "set_terminated", "get_run"):
            patch.setattr(client, name, gone)
        search.report("a", 2, 0.25)
        assert search.running.ask("b")
        search.report("b", 2, 0.5)
        search.report("b", 8, 0.75)
        search.running.complete("b")
        search.running.catch_up()
        with pytest.raises(TrackingError, match="no answer.*logs it once it can"):
            search.tracker.check()
    search.report("a", 4, 0.25)
    search.running.complete("a")
    search.tracker.failed = None
    search.running.catch_up()
    search.running.catch_up()
    search.tracker.check()
    runs = {run.data.tags["odedit.trial"]: run for run in search.runs()}
    assert {number: run.data.tags[STATE] for number, run in runs.items()} == {"0": "pruned", "1": "complete"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for number, expected in (("0", {2: 0.25, 4: 0.25}), ("1", {2: 0.5, 8: 0.75})):
        history = client.get_metric_history(runs[number].info.run_id, "score")
        assert [(point.step, point.value) for point in sorted(history, key=lambda point: point.step)] == [
            *expected.items()
        ]
        assert "editor.learning_rate" in runs[number].data.params
    assert "best so far: trial 1, score .750 | 2 of 2 trials" in search.text.getvalue()
    assert search.running.ask("c") is None and search.running.is_done


def test_a_trial_that_breaks_off_is_handed_out_again_so_often(values: dict[str, Any], tmp_path: Path) -> None:
    search = Search(values | {"trials": 1, "retries": 1}, tmp_path)
    asking = Asking(search.running)
    first = asking.suggest("a")
    assert isinstance(first, dict) and asking.suggest("b") is None, "one may come back: it is not finished"
    search.report("a", 2, 0.5)
    search.running.broke_off("a", "its worker died")
    again = asking.suggest("c")
    assert again == first
    search.report("c", 2, 0.5)
    search.running.broke_off("c", "its worker died")
    assert asking.suggest("d") == "FINISHED"
    (trial,) = search.asked.trials()
    assert (trial.state, trial.error, list(trial.reports)) == ("failed", "its worker died", [2])
    (run,) = search.runs()
    assert run.info.status == "FAILED" and run.data.tags["odedit.error"] == "its worker died"
    assert run.data.tags["mlflow.note.content"] == "its worker died"
    assert len(search.tracker.store.client.get_metric_history(run.info.run_id, "score")) == 1


def test_a_trial_is_handed_the_site_that_its_model_has(values: dict[str, Any], tmp_path: Path) -> None:
    """The backbone's site is filled in, also for an editor that the base does not name."""
    values["space"] = {"editor.name": {"choices": ["wise"]}}
    asked = Search(values, tmp_path).running.ask("a")
    assert asked is not None
    assert asked["settings"] == {"editor.name": "wise", "editor.site": "layers.2.ffn.in"}
