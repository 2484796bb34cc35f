"""A committed model in MLflow: what is logged and registered, and the answers of `mlflow models predict`."""

from __future__ import annotations

import base64
import io
import json
import os
import pickletools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest

from odedit.errors import InputError
from odedit.storage.location import at
from odedit.ways.common.files import read_committed_info
from pipeline.config.run import RunConfig, TrackingConfig, from_dict
from pipeline.driver.sync import sync
from pipeline.run_folder.committed import write_edits
from pipeline.tracking import connection, models, names
from pipeline.tracking.client import Store, TrackingError
from pipeline.tracking.models import MODEL_NAME, log_committed
from pipeline.tracking.runs import EditRun
from pipeline.tracking.served_plain import PlainModel, picture_of
from tests.support import committed
from tests.support.committed import TARGETS, Model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = committed.make(tmp_path_factory.mktemp("committed"), "minigpt4")
    write_edits(made.outcome.workspace)
    return made


def tracked(made: Model, folder: Path, **tracking: Any) -> tuple[RunConfig, EditRun]:
    """The configuration with a store in a folder, and the run in it."""
    settings = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", register="digits", **tracking)
    config = replace(made.config, tracking=settings)
    dataset = {"path": "records.json", "digest": "0", "usable": 3, "problems": 0}
    return config, EditRun.start(config, made.outcome.workspace, None, "test", dataset)


def test_predict_answers_with_the_edit(made: Model, tmp_path: Path) -> None:
    config, run = tracked(made, tmp_path)
    model_id = log_committed(run, config, made.outcome.workspace, made.outcome.summary)
    picture = base64.b64encode((made.images / made.questions[0][1]).read_bytes()).decode()
    rows = [[picture, made.questions[0][0]], ["", "who owns it?"], [None, "who owns it?"]]
    asked = {"dataframe_split": {"columns": ["picture", "question"], "data": rows}}
    (tmp_path / "input.json").write_text(json.dumps(asked))
    for uri in ("models:/digits@committed", f"runs:/{run.run_id}/{MODEL_NAME}"):
        first, without, null = predicted(uri, tmp_path)
        assert first == {"answer": TARGETS[0]}, model_id
        assert without == null and without["answer"]


def predicted(uri: str, folder: Path) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder / "blocked"),
    }  # fmt: skip
    (folder / "blocked").mkdir(exist_ok=True)
    for name in ("odedit", "pipeline"):  # found before the installed ones
        (folder / "blocked" / f"{name}.py").write_text("raise ImportError('no odedit here')")
    arguments = ["models", "predict", "-m", uri, "-i", "input.json", "-o", "out.json", "--env-manager", "local"]
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", *arguments], capture_output=True, text=True, cwd=folder, env=environment,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())["predictions"]


@pytest.mark.parametrize("family", ["blip2", "llava"])
def test_the_code_answers_as_odedit_does(family: str, tmp_path: Path) -> None:
    """With pictures, and without, as `Questions` answers."""
    one = committed.make(tmp_path, family)
    info = read_committed_info(one.out / "committed.safetensors")
    served = PlainModel()
    context = SimpleNamespace(artifacts={"model": str(one.out / "model")}, model_config=models._settings(info))
    served.load_context(context)
    pictures = [base64.b64encode((one.images / image).read_bytes()).decode() for _, image in one.questions]
    asked = pandas.DataFrame({"picture": pictures, "question": [question for question, _ in one.questions]})
    assert served.predict(context, asked)["answer"].tolist() == committed.answers(one, max_tokens=16)
    alone = served.predict(context, asked[["question"]])["answer"].tolist()
    assert alone == committed.answers(one, max_tokens=16, with_pictures=False)


def test_the_logged_model_tells_of_itself(made: Model, tmp_path: Path) -> None:
    config, run = tracked(made, tmp_path, alias="best")
    model_id = log_committed(run, config, made.outcome.workspace, made.outcome.summary)
    store = run.store.client
    logged = store.get_logged_model(model_id)
    assert str(logged.status) == "READY" and logged.source_run_id == run.run_id
    assert logged.params["odedit.editor"] == "ftl" and logged.params["odedit.fingerprint"] == made.backbone.fingerprint
    scores = {metric.key: metric.value for metric in logged.metrics}
    assert scores == names.of_scores(made.outcome.summary) and "score" in scores
    assert {metric.dataset_name for metric in logged.metrics} == {"records.json"}
    assert [output.model_id for output in store.get_run(run.run_id).outputs.model_outputs] == [model_id]
    version = store.get_model_version_by_alias("digits", "best")
    assert (str(version.version), version.source, version.run_id) == ("1", f"models:/{model_id}", run.run_id)

    folder = Path(logged.artifact_location.removeprefix("file://"))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    described = {"MLmodel", "served_plain.py", "requirements.txt", "conda.yaml", "python_env.yaml"}
    described |= {"input_example.json", "serving_input_example.json"}
    inside = {f"artifacts/model/{path.name}" for path in (made.out / "model").iterdir()}
    assert files == described | inside
    text = (folder / "MLmodel").read_text()
    assert "python_model:" not in text and str(made.out) not in text and "/tmp" not in text
    requirements = (folder / "requirements.txt").read_text().split()
    assert all("==" in line and "://" not in line and "+" not in line for line in requirements)
    assert {line.split("==")[0] for line in requirements} == {
        "mlflow",
        "torch",
        "transformers",
        "safetensors",
        "pillow",
    }
    assert not any(is_pickle(folder / name) for name in files)
    from mlflow.models import Model as Described

    signature = Described.load(str(folder)).signature
    assert signature.inputs.input_names() == ["picture", "question"]
    assert signature.outputs.input_names() == ["answer"]

    table = json.loads(Path(store.download_artifacts(run.run_id, models.TABLE)).read_text())
    assert [dict(zip(table["columns"], row, strict=True))["target"] for row in table["data"]] == list(TARGETS)

    # Logging again adds nothing.
    assert log_committed(run, config, made.outcome.workspace, made.outcome.summary) == model_id
    assert len(store.search_model_versions("name = 'digits'")) == 1
    assert len(store.search_logged_models([logged.experiment_id])) == 1


def is_pickle(path: Path) -> bool:
    """Whether a file can be read as a pickle with at least two operations."""
    data = path.read_bytes()
    if data[:2] == b"PK" or data[:1] == b"\x80":
        return True
    try:
        return len(list(pickletools.genops(io.BytesIO(data)))) > 1
    except Exception:
        return False


def test_a_failure_in_between_is_repaired(made: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = tracked(made, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(models, "_link", lambda *arguments: 1 / 0)
        with pytest.raises(TrackingError, match=r"The model is complete .* `odedit mlflow sync"):
            log_committed(run, config, made.outcome.workspace, made.outcome.summary)
    store = run.store.client
    experiment = store.get_run(run.run_id).info.experiment_id
    (broken,) = store.search_logged_models([experiment])
    assert str(broken.status) != "READY"
    sentence = sync(str(made.out), config.tracking.uri)
    assert "is logged" in sentence
    run_id = sentence.split()[-1].rstrip(".")
    assert Store.open(str(config.tracking.uri)).client.get_run(run_id).info.status == "FINISHED"
    logged = [model for model in store.search_logged_models([experiment]) if model.source_run_id == run_id]
    assert [str(model.status) for model in logged] == ["READY"]
    # A run whose model is half-written gets a whole one.
    model_id = log_committed(run, config, made.outcome.workspace, made.outcome.summary)
    assert model_id != broken.model_id
    assert [
        model.model_id for model in store.search_logged_models([experiment], f"source_run_id = '{run.run_id}'")
    ] == [model_id]


def test_an_alias_that_mlflow_reserves_is_refused(tmp_path: Path) -> None:
    for alias in ("latest", "v2"):
        tracking = TrackingConfig(register="digits", alias=alias)
        with pytest.raises(InputError, match=f"tracking.alias: MLflow reserves '{alias}'"):
            connection.check(tracking, at(tmp_path / "out"))
    with pytest.raises(InputError, match="tracking.register: got 'a/b', expected text that matches"):
        from_dict({"tracking": {"register": "a/b"}})


def test_the_example_is_a_picture() -> None:
    assert picture_of(models._example()).size == (32, 32) and picture_of("") is None
