"""MLflow: the content of a logged run, and the scores of an edit that is downloaded from it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from odedit.__main__ import app
from odedit.backbones import Backbone, encode_requests
from odedit.data.records import RawRecord
from odedit.editing.files import load_edits
from odedit.errors import InputError
from odedit.evaluation.scores import evaluate
from odedit.evaluation.statistics import MAIN
from odedit.inputs.prompts import find_template
from pipeline import commands
from pipeline.config.run import from_dict
from pipeline.driver.run import Outcome
from pipeline.driver.sync import sync
from pipeline.run_folder import rows as results
from pipeline.run_folder.sources import resolve
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking.client import Store, TrackingError, connect, open_command
from pipeline.tracking.fetch import fetch_edit
from pipeline.tracking.runs import EditRun
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Preparer
from tests.support.mmedit_files import record, write_array


@pytest.fixture
def tracked(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"tracking": {"experiment": "test", "curves": 2}}


def test_a_run_is_logged_once_and_its_edits_reproduce_their_scores(
    tracked: dict[str, Any],
    inline: Callable[..., Outcome],
    backbone: Backbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = from_dict(tracked)
    outcome = inline(config)
    assert outcome.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(outcome.tracking_uri)
    run = client.get_run(outcome.run_id)

    assert run.info.status == "FINISHED"
    assert run.data.params["editor.max_steps"] == "2"
    assert run.data.metrics["n"] == 5
    for metric in MAIN:
        figure = outcome.summary["metrics"][metric]
        stored = [run.data.metrics[name] for name in (metric, f"{metric}_low", f"{metric}_high")]
        assert stored == pytest.approx([figure["mean"], figure["low"], figure["high"]])
    assert json.loads(run.inputs.dataset_inputs[0].dataset.profile) == {"usable": 5, "problems": 0}
    rows = list(results.read_rows(results.parts(outcome.workspace)))
    curve = client.get_metric_history(outcome.run_id, f"curves/{rows[0]['edit_id']}/rel")
    assert [point.value for point in sorted(curve, key=lambda p: p.step)] == pytest.approx(rows[0]["losses"]["rel"])
    names = {item.path for item in client.list_artifacts(outcome.run_id)}
    assert {"config.yaml", "summary.json", "report.html", "results", "edits", "edits_table.json"} <= names
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())

    # Repeating the run adds nothing.
    assert inline(config).run_id == outcome.run_id
    assert len(client.search_runs([run.info.experiment_id])) == 1

    row = rows[3]
    capsys.readouterr()
    commands.fetch(str(outcome.run_id), [row["edit_id"]], outcome.tracking_uri, tmp_path / "fetched")
    file = Path(capsys.readouterr().out.strip())
    with pytest.raises(InputError, match=r"edit 'none' .* the run has vqa_eval-000000, .* and 2 more\."):
        commands.fetch(str(outcome.run_id), ["none"], outcome.tracking_uri, tmp_path / "fetched")
    assert file.is_relative_to(tmp_path / "fetched")
    editor, params, _ = load_edits([file], backbone)
    job = Job(config, resolve(config.data, outcome.workspace.out), outcome.workspace)
    requests = [request for request in Preparer(job)(1).requests if request.edit_id == row["edit_id"]]
    _, evaluation = encode_requests(backbone, requests, find_template(config.data.template))
    (scores,) = evaluate(backbone, editor, params, evaluation, config.evaluation)
    assert {name: scores[name] for name in MAIN} == {name: row[name] for name in MAIN}


def test_a_run_whose_store_was_away_at_the_end_is_logged_later(
    tracked: dict[str, Any], inline: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = from_dict(tracked)
    out = Path(config.out)

    def gone(*arguments: Any) -> None:
        raise ConnectionError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(EditRun, "_log_metrics", gone)
        with pytest.raises(TrackingError, match=f"odedit mlflow sync {out}"):
            inline(config)
        with pytest.raises(TrackingError):
            sync(str(out))
    rows = {path: path.stat().st_mtime_ns for path in out.glob("results/*")}
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == "FAILED" and "rel" not in run.data.metrics
    assert CliRunner().invoke(app, ["mlflow", "sync", str(out)]).stdout.strip() == (
        f"{out} is logged, as run {run.info.run_id}."
    )
    run = client.get_run(run.info.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["n"] == 5
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"results", "edits", "edits_table.json"}
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert "is logged already" in sync(str(out))
    # Another store gets a run of its own.
    assert "is logged" in sync(str(out), f"sqlite:///{tmp_path}/other.db")
    other = connect(f"sqlite:///{tmp_path}/other.db")
    (copy,) = other.search_runs([other.get_experiment_by_name("test").experiment_id])
    assert copy.data.metrics == run.data.metrics and copy.data.params["editor.max_steps"] == "2"
    for folder, expected in ((tmp_path, "holds no run"), (out, "is not finished")):
        (out / "summary.json").unlink(missing_ok=True)
        synced = CliRunner().invoke(app, ["mlflow", "sync", str(folder)])
        assert synced.exit_code == 2 and expected in synced.stderr


def test_a_run_without_an_edit_has_failed_and_says_why(
    tracked: dict[str, Any], inline: Callable[..., Outcome], tmp_path: Path
) -> None:
    records = [record(number, src=number) for number in range(3)]  # a question that is not text
    write_array(Path(tracked["data"]["path"]), [*records, "no record"])
    outcome = inline(from_dict(tracked | {"out": str(tmp_path / "runs" / "nothing")}))
    reasons = [(reason["status"], reason["count"]) for reason in outcome.summary["reasons"]]
    assert outcome.summary["n"] == 0 and reasons == [("skipped", 3), ("skipped", 1)]
    run = connect(outcome.tracking_uri or "").get_run(outcome.run_id)
    assert run.info.status == "FAILED" and run.info.run_name == "nothing"
    assert "3 skipped, the first: vqa_eval.json, record 0: wrong type" in run.data.tags["odedit.reasons"]
    assert "3 skipped, the first: vqa_eval.json, record 0" in outcome.workspace.report.read_text()


@pytest.mark.parametrize(
    ("out", "name"),
    [
        ("runs/wise-odedit", "wise-odedit"),
        ("runs/one/", "one"),
        ("s3://bucket/runs/two?region=eu-west-1", "two"),
        (".", Path.cwd().name),
    ],
)
def test_runs_are_named_by_their_folder(out: str, name: str) -> None:
    assert from_dict({"out": out}).name == name
    assert from_dict({"out": out, "tracking": {"run_name": "mine"}}).name == "mine"


def test_the_command_that_opens_a_store_can_be_pasted(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'my runs' / 'mlflow.db'}"
    command = shlex.split(open_command(uri))
    assert command[1:] == ["ui", "--backend-store-uri", uri]


def test_a_store_that_cannot_be_used_is_an_error_before_any_work(
    tracked: dict[str, Any], inline: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "not.db").write_text("this is no database" * 100)
    config = from_dict(tracked | {"tracking": {"uri": f"sqlite:///{tmp_path}/not.db"}})
    with pytest.raises(InputError, match=r"tracking\.uri"):
        inline(config)


def test_a_missing_edit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch_edit(f"sqlite:///{tmp_path}/mlflow.db", "0" * 32, "edit", tmp_path)
    assert not list(tmp_path.iterdir()), "a mistyped address creates no database"


def test_only_edits_that_worked_count_as_logged_curves(tmp_path: Path) -> None:
    workspace = Workspace.of(str(tmp_path))
    workspace.create()
    rows = [
        results.base_row(RawRecord("f.json", index, f"edit-{index}", "vqa", {}), from_dict({}), status)
        | {"losses": {"rel": [1.0]}}
        for index, status in enumerate([results.FAILED, results.EDITED, results.EDITED])
    ]
    results.write_part(workspace.part(0), rows)
    logged: list[str] = []

    class Client:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            logged.extend(metric.key for metric in metrics)

    EditRun(Store("uri", Client()), "run")._log_losses(workspace, 1)
    assert logged == ["curves/edit-1/rel"]
