"""`odedit train`: from a file of records to weights that a run edits with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from odedit import InputError, world
from odedit.__main__ import app
from odedit.data.records import RawRecord
from odedit.editing.files import load_edit
from odedit.editors.common.weights import save_weights
from odedit.inputs.batch import EditBatch
from odedit.objectives.contrast import Contrast
from odedit.training.state import TrainingState
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows as results
from pipeline.run_folder.rows import read_rows
from pipeline.training import train
from tests.support.mmedit_files import record, write_array, write_images

MEND = {
    "name": "mend", "sites": ["layers.-1.ffn.in"], "rank": 4, "edit_rate": 0.01, "learning_rate": 1e-4,
    "batch_size": 2, "accumulate": 1, "training_steps": 4, "validate_every": 2,
}  # fmt: skip


@pytest.fixture
def values(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Five records to train with, and three others to validate with."""
    others = [record(number) for number in range(10, 13)]
    write_images(tmp_path, others)
    section = {"path": settings["data"]["path"], "validation": str(write_array(tmp_path / "val.json", others))}
    return settings | {"editor": dict(MEND), "training": section}


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_trained_weights_edit(
    values: dict[str, Any], tmp_path: Path, inline: Callable[[RunConfig], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = write(tmp_path, values), tmp_path / "weights" / "mend.safetensors"
    done = odedit("train", "mend", "--config", config, "--out", weights, "objective.name=native")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.strip() == str(weights)
    assert f"editor.checkpoint={weights}" in done.stderr and "5 training records, 3 validation records" in done.stderr
    again = odedit("train", "mend", "--config", config, "--out", weights, "objective.name=native")
    assert again.exit_code == 0 and "finished at step 4" in again.stderr and "training records" not in again.stderr

    # Workers run in other folders, so a relative path is made absolute, in the edits as well.
    monkeypatch.chdir(tmp_path)
    values["editor"] = MEND | {"checkpoint": "weights/mend.safetensors"}
    outcome = inline(from_dict(values))
    assert outcome.summary["n"] == 5 and not outcome.summary["failed"]
    _, info = load_edit(outcome.workspace.edits.glob("*.safetensors")[0])
    assert info.editor_config["checkpoint"] == str(weights)
    rows = list(read_rows(outcome.workspace.results.glob("*.parquet"), ["steps", "stop_reason"]))
    assert {row["steps"] for row in rows} == {0}


def test_training_takes_hard_negatives_from_the_training_records(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    of_turn = Contrast.in_turn

    def in_turn(self: Contrast, batch: EditBatch, turn: int) -> EditBatch:
        shown = of_turn(self, batch, turn)
        seen.append(set(shown.slots))
        assert bool(shown.select(["near_locality_2"]).present_EK.all())
        return shown

    monkeypatch.setattr(Contrast, "in_turn", in_turn)
    config, weights = write(tmp_path, values), tmp_path / "weights" / "mend.safetensors"
    done = odedit("train", "mend", "--config", config, "--out", weights, "objective.name=contrast")
    assert done.exit_code == 0, (done.output, done.exception)
    wanted = {"edit", "rephrase", "near_locality_1", "near_locality_2"}
    assert seen and all(slots == wanted for slots in seen)


def test_an_interrupted_training_is_resumed_by_the_same_command(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict(values)
    whole = train.run(config, tmp_path / "whole.safetensors", Console(quiet=True), fresh=False)
    out, stream = tmp_path / "cut.safetensors", io.StringIO()
    console = Console(file=stream)
    original = train._Bar.__call__

    def interrupt(self: Any, name: str, done: int, total: int | None, figures: Any) -> None:
        original(self, name, done, total, figures)
        if self._unit == "step" and done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train._Bar, "__call__", interrupt)
        train.run(config, out, console, fresh=False)
    assert not out.exists()
    train.run(config, out, console, fresh=False)
    assert "Resuming" in stream.getvalue() and "at step 3 of 4" in stream.getvalue()
    resumed, uninterrupted = load_file(out), load_file(whole)
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


def test_weights_of_other_settings_are_not_replaced(values: dict[str, Any], tmp_path: Path) -> None:
    out, quiet = tmp_path / "mend.safetensors", Console(quiet=True)
    values["editor"]["training_steps"] = 1
    train.run(from_dict(values), out, quiet, fresh=False)
    values["seed"] = 1
    with pytest.raises(InputError, match="seed: was 0, now 1"):
        train.run(from_dict(values), out, quiet, fresh=False)
    before = load_file(out)
    train.run(from_dict(values), out, quiet, fresh=True)
    assert any(not torch.equal(value, before[name]) for name, value in load_file(out).items())
    train.Files(str(out)).state.delete()
    with pytest.raises(InputError, match="is there already"):
        train.run(from_dict(values), out, quiet, fresh=False)


def test_a_run_finds_missing_or_wrong_weights_before_any_worker(
    values: dict[str, Any], tmp_path: Path, inline: Callable[[RunConfig], Outcome]
) -> None:
    with pytest.raises(InputError, match="odedit train mend"):
        inline(from_dict(values))
    values["editor"]["checkpoint"] = str(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no such file"):
        inline(from_dict(values))
    values["editor"]["training_steps"] = 1
    path = train.run(from_dict(values), tmp_path / "mend.safetensors", Console(quiet=True), fresh=False)
    values["editor"] |= {"checkpoint": str(path), "rank": 8}
    with pytest.raises(InputError, match="another setting of the editor"):
        inline(from_dict(values))
    assert not list((tmp_path / "out").glob("results/*"))


@pytest.mark.parametrize(
    ("editor", "override", "expected"),
    [
        ("wise", "editor.name=wise", "'wise' has no weights of its own"),
        ("unike", "editor.num_layers=9", "its editor is 'mend'; 'unike' takes its defaults"),
        ("mend", "training.path=none.json", "none.json"),
        ("mend", "training.path=embedded:tran", "Did you mean 'train'?"),
        ("mend", "training.limit=0", "training.limit: got 0"),
        ("mend", "editor.training_stps=3", "Did you mean 'training_steps'?"),
        ("mend", "editor.sites=[layers.9.ffn.in]", "Unknown site 'layers.9.ffn.in'"),
        ("mend", "training.image_root=/nowhere", "there is no folder '/nowhere'"),
    ],
)
def test_wrong_input_is_a_sentence(
    values: dict[str, Any], tmp_path: Path, editor: str, override: str, expected: str
) -> None:
    result = odedit("train", editor, "--config", write(tmp_path, values), "--out", tmp_path / "w.safetensors", override)
    assert result.exit_code == 2, (result.output, result.exception)
    assert expected in result.output and "Traceback" not in result.output


def test_a_model_of_yours_is_not_trained_on_embedded_records_unasked(values: dict[str, Any], tmp_path: Path) -> None:
    values["backbone"] = {"family": "blip2", "checkpoint": str(world.checkpoint_path("blip2"))}
    train_mend = ("train", "mend", "--out", tmp_path / "w.safetensors", "--config")
    files = values.pop("training")
    for missing, given in (("path", {}), ("validation", {"path": files["path"]})):
        refused = odedit(*train_mend, write(tmp_path, values | {"training": given}))
        assert refused.exit_code == 2 and f"training.{missing}: missing" in refused.output, refused.output
    assert not (tmp_path / "w.safetensors").exists()
    own = odedit(*train_mend, write(tmp_path, values | {"training": files}))
    assert own.exit_code == 0 and "handwritten digits" not in own.output, (own.output, own.exception)
    asked = {"path": "embedded:train", "validation": "embedded:validation", "limit": 4, "validation_limit": 4}
    done = odedit(*train_mend, write(tmp_path, values | {"training": asked}), "--fresh")
    assert done.exit_code == 0 and "suit a model of the embedded world only" in " ".join(done.output.split())


def test_an_editor_that_learns_nothing_and_a_wrong_file_are_named(values: dict[str, Any], tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(InputError, match="'ftl' has no weights of its own"):
        train.run(from_dict(values | {"editor": {"name": "ftl"}}), None, quiet, fresh=False)
    with pytest.raises(InputError, match="expected a file that ends in .safetensors"):
        train.run(from_dict(values), tmp_path / "weights.pt", quiet, fresh=False)


def test_a_log_says_how_long_a_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), iter(range(0, 1000, 30))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with train._Bar(Console(file=stream, width=200), "step") as bar:
        for step in (0, 10, 100):
            bar("training", step, 100, {"loss": 2.0})
    first, second, last = stream.getvalue().splitlines()
    assert first == "training: step 0 of 100, loss 2"
    assert second.startswith("training: step 10 of 100, loss 2, ") and second.endswith(" left at most")
    assert last == "training: step 100 of 100, loss 2"


def test_unusable_records_are_counted_and_none_usable_is_an_error(values: dict[str, Any], tmp_path: Path) -> None:
    records = json.loads(Path(values["training"]["path"]).read_text())
    del records[1]["alt"]
    values["training"]["path"] = str(write_array(tmp_path / "some.json", records))
    values["editor"]["training_steps"] = 1
    stream = io.StringIO()
    train.run(from_dict(values), tmp_path / "mend.safetensors", Console(file=stream), fresh=False)
    assert "training: 1 record skipped; first: " in stream.getvalue()
    assert "4 training records" in stream.getvalue()


def test_the_loss_curve_is_logged(values: dict[str, Any], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    values["editor"]["training_steps"] = 2
    values["tracking"] = {"enabled": True, "experiment": "training"}
    train.run(from_dict(values), tmp_path / "w" / "mend.safetensors", Console(quiet=True), fresh=False)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'w' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("training")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["editor.rank"] == "4"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "training_loss")] == [1, 2]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "validation_loss")] == [0, 2]


def test_a_state_says_how_often_it_has_not_improved() -> None:
    state = TrainingState({}, {}, {}, {}, best_step=2, looks=((0, 3.0), (2, 1.0), (4, 1.5), (6, 1.2)))
    assert state.looks_without_improvement == 2 and state.looked_at == 6


def test_rows_say_what_the_weights_were_trained_with(tmp_path: Path) -> None:
    """A run under `native` may edit with weights that were trained under ODEdit."""
    path = tmp_path / "mend.safetensors"
    save_weights(path, {"a": torch.zeros(1)}, "mend", {}, "0" * 16, "odedit, held_out")
    config = from_dict({"editor": {"name": "mend", "checkpoint": str(path)}, "objective": {"name": "native"}})
    record = RawRecord("records.json", 0, "edit-0", "vqa", {"src": "what?", "alt": "this"})
    row = results.base_row(record, config, results.EDITED)
    assert (row["objective"], row["trained_with"]) == ("native", "odedit, held_out")
    plain = results.base_row(record, from_dict({"editor": {"name": "wise"}}), results.EDITED)
    assert plain["trained_with"] is None
