"""MLflow: the content of a logged run, and the scores of an edit that is downloaded from it."""

from __future__ import annotations

import getpass
import json
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from odedit.__main__ import app
from odedit.backbones import Backbone, encode_requests
from odedit.editing.files import load_edits
from odedit.errors import InputError
from odedit.evaluation.scores import evaluate
from odedit.evaluation.statistics import MAIN
from odedit.inputs.prompts import find_template
from odedit.storage.location import at
from odedit.ways.common.files import CommittedInfo, save_committed
from pipeline import commands
from pipeline.config.run import from_dict
from pipeline.config.version import commit
from pipeline.driver.preflight import update
from pipeline.driver.run import Outcome
from pipeline.driver.sync import sync
from pipeline.interrupts import terminate_as_interrupt
from pipeline.run_folder import rows as results
from pipeline.run_folder.sources import resolve
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking import origin
from pipeline.tracking.client import TrackingError
from pipeline.tracking.connection import connect, open_command
from pipeline.tracking.fetch import fetch_edit
from pipeline.tracking.names import MOST
from pipeline.tracking.runs import EditRun, _curves, log_training
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
    logged = run.data.metrics
    assert (logged["records/edited"], logged["score"]) == (5, outcome.summary["score"])
    for metric in MAIN:
        assert logged[f"metrics/{metric}"] == pytest.approx(outcome.summary["metrics"][metric]["mean"])
    rows = list(results.read_rows(results.parts(outcome.workspace)))
    curve = client.get_metric_history(outcome.run_id, "training/curves/rel")
    losses = [row["losses"]["rel"] for row in rows[:2]]
    assert [point.value for point in sorted(curve, key=lambda p: p.step)] == pytest.approx(np.mean(losses, axis=0))
    names = {item.path for item in client.list_artifacts(outcome.run_id)}
    expected = {"config.yaml", "summary.json", "report.html", "results", "edits", "figures", "table_images"}
    assert expected | {"edits_table.json", "scores.json", "worst_edits.json"} <= names
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


def test_a_finished_run_is_logged_to_another_store_that_is_named_later(
    tracked: dict[str, Any], inline: Callable[..., Outcome], tmp_path: Path
) -> None:
    first = inline(from_dict(tracked))
    uris = [str(first.tracking_uri), f"sqlite:///{tmp_path}/other.db"]
    ids = [first.run_id]
    for uri in (uris[1], uris[1], uris[0]):
        outcome = inline(from_dict(tracked | {"tracking": {**tracked["tracking"], "uri": uri}}))
        assert outcome.tracking_uri == uri
        ids.append(outcome.run_id)
    assert ids == [ids[0], ids[1], ids[1], ids[0]] and ids[0] != ids[1]
    for uri, run_id in zip(uris, ids, strict=False):
        client = connect(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
        assert (run.info.run_id, run.info.status, run.data.metrics["records/edited"]) == (run_id, "FINISHED", 5)
    assert str(ids[0]) in sync(str(first.workspace.out)), "the last command named the first store"


def interrupted(monkeypatch: pytest.MonkeyPatch, call: str, signals: int = 1) -> None:
    """Sends Ctrl-C once, right after a call of MLflow's client."""
    from mlflow import MlflowClient

    whole, sent = getattr(MlflowClient, call), []

    def interrupt(client: Any, *arguments: Any, **named: Any) -> Any:
        done = whole(client, *arguments, **named)
        while len(sent) < signals:
            sent.append(call)
            signal.raise_signal(signal.SIGINT)
        return done

    monkeypatch.setattr(MlflowClient, call, interrupt)


@pytest.mark.parametrize(("call", "signals", "runs"), [("create_run", 1, 1), ("log_inputs", 1, 1), ("log_batch", 2, 2)])
def test_an_interrupt_at_the_start_closes_the_run_which_goes_on_later(
    tracked: dict[str, Any],
    inline: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    call: str,
    signals: int,
    runs: int,
) -> None:
    def statuses() -> list[str]:
        client = connect(f"sqlite:///{tmp_path}/mlflow.db")
        found = client.search_runs([client.get_experiment_by_name("test").experiment_id])
        return sorted(run.info.status for run in found)

    interrupted(monkeypatch, call, signals)
    with pytest.raises(KeyboardInterrupt):
        inline(from_dict(tracked))
    assert statuses() == ["KILLED"]
    inline(from_dict(tracked))
    assert statuses() == ["FINISHED", "KILLED"][:runs], "a second Ctrl-C leaves no time to store the id"


@pytest.mark.parametrize(("call", "signals", "status"), [("create_run", 1, "FINISHED"), ("log_batch", 2, "KILLED")])
def test_the_run_of_a_training_is_closed_by_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, signals: int, status: str
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = from_dict({"tracking": {"uri": uri, "experiment": "test"}})
    interrupted(monkeypatch, call, signals)
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        log_training(config, "code", {"loss": [(1, 0.5)]}, at(tmp_path / "weights.safetensors"), {})
    client = connect(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == status


def test_what_a_team_sees_of_a_run(tracked: dict[str, Any], inline: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = inline(from_dict(tracked))
    client = connect(str(outcome.tracking_uri))
    run = client.get_run(outcome.run_id)
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.odedit"])["state"])
    columns = [column.rstrip("`").split(".`") for column in (view["orderByKey"], *view["selectedColumns"])]
    assert columns[0] == ["metrics", "score"]
    assert {name for kind, name in columns if kind == "params"} <= run.data.params.keys()
    shown = {name for kind, name in columns if kind == "metrics"}
    assert shown - {"metrics/m_loc_near", "metrics/m_loc_far"} <= run.data.metrics.keys(), (
        "records without a near probe"
    )

    groups = [name.rpartition("/")[0] for name in sorted(run.data.metrics)]
    assert list(dict.fromkeys(groups)) == ["metrics", "records", "", "time", "training/curves"], "as pages sort them"
    assert len(groups) <= MOST and {f"training/curves/rel_p{part}" for part in (10, 90)} <= run.data.metrics.keys()
    histories = {name: client.get_metric_history(outcome.run_id, name) for name in run.data.metrics}
    assert all(any(point.value for point in each) for name, each in histories.items() if "curves" in name)

    tags = run.data.tags
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("odedit edit", "LOCAL")
    assert tags["mlflow.user"] == getpass.getuser() and tags.get("mlflow.source.git.commit", "") == commit()
    note = tags["mlflow.note.content"]
    rel = outcome.summary["metrics"]["rel"]["mean"]
    assert note.startswith(f"**score {outcome.summary['score']:.3f}**: `rel` {rel:.3f}, `t_gen` ")
    assert "\n\n5 edits, 0 failed, 0 skipped: `wise` under" in note
    assert "| `m_gen` | image generality |" in note
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.source_type == "local" and json.loads(used.dataset.profile) == {"usable": 5, "problems": 0}
    assert json.loads(used.dataset.source) == {"uri": tracked["data"]["path"]}

    listed = {each["path"] for each in json.loads(tags["mlflow.loggedArtifacts"]) if each["type"] == "table"}
    assert listed == {"edits_table.json", "scores.json", "worst_edits.json"}
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    worst = json.loads((folder / "worst_edits.json").read_text())
    rows = [dict(zip(worst["columns"], row, strict=True)) for row in worst["data"]]
    assert len(rows) == 5 and rows[0]["holds"] <= rows[-1]["holds"]
    for row in rows:
        assert row["picture"]["type"] == "image" and Image.open(folder / row["picture"]["filepath"]).format == "WEBP"
    for name in ("scores", "curves"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads((folder / "scores.json").read_text())["data"]
    assert [row[0] for row in scores][: len(MAIN)] == list(MAIN) and len(scores) == len(outcome.summary["metrics"])


@pytest.mark.parametrize(
    ("path", "source_type", "source"),
    [
        ("/data/a.json", "local", {"uri": "/data/a.json"}),
        ("s3://bucket/a.json?region=eu", "s3", {"uri": "s3://bucket/a.json?region=eu"}),
        ("gs://bucket/a.json", "gs", {"uri": "gs://bucket/a.json"}),
        ("https://host/a.json", "http", {"url": "https://host/a.json"}),
    ],
)
def test_a_data_set_has_its_true_source(path: str, source_type: str, source: dict[str, str]) -> None:
    found = origin.dataset(path, "0" * 40, {"usable": 1})
    assert (found.name, found.source_type, json.loads(found.source)) == ("a.json", source_type, source)
    assert len(found.digest) == 36


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
    assert run.info.status == "FAILED" and not run.data.metrics
    assert CliRunner().invoke(app, ["mlflow", "sync", str(out)]).stdout.strip() == (
        f"{out} is logged, as run {run.info.run_id}."
    )
    run = client.get_run(run.info.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["records/edited"] == 5
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"results", "edits", "edits_table.json"}
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert "is logged already" in sync(str(out))
    # Another store gets a run of its own; an earlier version wrote only that the run is logged.
    update(Workspace.of(out), logged=True)
    assert "is logged" in sync(str(out), f"sqlite:///{tmp_path}/other.db")
    assert f"is logged already, as run {run.info.run_id}" in sync(str(out))
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
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(r"**Nothing was edited**: 3 skipped, the first: vqa\_eval.json, record 0: wrong type")
    assert "score" not in run.data.metrics and run.data.metrics["records/skipped"] == 4
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
    address = "https://tracking.test/#/experiments?workflowType=machine_learning"
    assert shlex.split(open_command("https://tracking.test/")) == ["open", address]


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


def test_a_committed_model_has_the_curves_of_its_training(tmp_path: Path) -> None:
    workspace = Workspace.of(str(tmp_path))
    workspace.create()
    curves = {"nothing": [0.0, 0.0], "loss": [float(step + 1) for step in range(1201)]}
    info = CommittedInfo(
        "joint", {}, "lora", {}, "blip2", "embedded", "0", "float32", "mmedit", ("edit-1",), details={"curves": curves}
    )
    save_committed(workspace.committed, {"weight": torch.zeros(1, 1)}, info)
    points = list(_curves(workspace, max_edits=0))
    assert {name for name, _, _ in points} == {"training/curves/loss"} and len(points) <= 500
    assert (points[0][1:], points[-1][1:]) == ((1.0, 0), (1201.0, 1200))
    curves = {"step": [1.0, 5.0, 20.0], "retention_rel": [1.0, 0.9, float("nan")], "other": [0.5]}
    save_committed(workspace.committed, {"weight": torch.zeros(1, 1)}, replace(info, details={"curves": curves}))
    retention = "training/curves/retention_rel"
    expected = {(retention, 1.0, 1), (retention, 0.9, 5), ("training/curves/other", 0.5, 0)}
    assert {*_curves(workspace, max_edits=0)} == expected
