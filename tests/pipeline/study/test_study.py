"""Whole studies in this process: run, interrupted and resumed; their files and MLflow runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from odedit import InputError
from odedit.__main__ import app
from odedit.errors import NothingUsable
from pipeline.config import strict
from pipeline.report.cloud import HiddenStates
from pipeline.run_folder.rows import parts, read_rows
from pipeline.run_folder.workspace import Workspace
from pipeline.study import data, plots, spec, states
from pipeline.study import run as runner
from pipeline.study.spec import StudyConfig
from pipeline.tracking.client import PARENT_TAG
from pipeline.tracking.connection import connect
from pipeline.workers import editor as actor
from pipeline.workers import engine
from tests.support import inline_pipeline

QUIET = Console(quiet=True)
WISE = {"name": "wise", "site": "layers.2.ffn.in", "max_steps": 2}


@pytest.fixture
def shared_world(worlds: dict[int, dict[str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Links a benchmark that is written already into the folder where a study writes it."""

    def linked(folder: Path, seed: int = 0, rephrases: int = 1) -> None:
        if not folder.exists():
            shutil.copytree(worlds[seed]["images"].parent, folder, copy_function=os.link)

    monkeypatch.setattr(data, "build_embedded", linked)


@pytest.fixture
def small(settings: dict[str, Any]) -> dict[str, Any]:
    """A study of two arms over the first two made-up records, in groups of two."""
    section = settings["data"] | {"limit": 2}
    shared = {name: settings[name] for name in ("supervision", "editor", "pipeline", "tracking")}
    return {
        "title": "Small",
        "draw": None,
        "settings": shared | {"data": section, "objective": {"sigma2_0": 10.0}, "evaluation": {"generate": False}},
        "axes": {"objective": {"native": {"objective": {"name": "native"}}, "ODEdit": {}}},
        "baseline": {"objective": "native"},
        "plot": {"kind": "dots", "y": "objective"},
    }


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def study_of(values: dict[str, Any]) -> StudyConfig:
    return strict.build(StudyConfig, values)


def test_a_study_from_the_command_line_is_interrupted_resumed_and_finished_in_mlflow(
    tmp_path: Path, shared_world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    config = tmp_path / "small.yaml"
    changes = {
        "draw": {"per_task": 1},
        "axes": {"generality risk": {"MMD-s RBF": {}, "none": {"objective": {"generality_weight": 0.0}}}},
        "settings": {"objective": {"sigma2_0": 10.0}, "stopping": {"max_steps": 1}, "pipeline": {"batch_size": 1}},
    }
    config.write_text(yaml.safe_dump(changes))
    out = tmp_path / "studies" / "one"
    command = ("study", "table4", "--config", config, "--out", out)
    edited: list[str] = []
    original = actor.edit

    def edit(backbone: Any, editor: Any, objective: Any, batch: Any, *rest: Any) -> Any:
        edited.append(f"{objective.config.generality_weight:g} {batch.edit_ids[0].split('-')[0]}")
        if len(edited) == 4:
            raise KeyboardInterrupt
        return original(backbone, editor, objective, batch, *rest)

    monkeypatch.setattr(actor, "edit", edit)
    cut = odedit(*command)
    assert cut.exit_code == 130 and "the same command goes on" in cut.stderr, (cut.output, cut.exception)
    uri = f"sqlite:///{out}/mlflow.db"
    client = connect(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "table4"]

    def runs() -> tuple[Any, dict[str, Any]]:
        every = client.search_runs([experiment.experiment_id])
        (parent,) = [run for run in every if PARENT_TAG not in run.data.tags]
        children = {run.info.run_name: run for run in every if run is not parent}
        assert {run.data.tags[PARENT_TAG] for run in children.values()} == {parent.info.run_id}
        return parent, children

    parent, children = runs()
    assert (parent.info.run_name, parent.info.status) == ("table4", "KILLED")
    assert {name: run.info.status for name, run in children.items()} == {"MMD-s RBF": "FINISHED", "none": "KILLED"}
    assert not (out / "table.md").exists()

    done = odedit(*command)
    assert done.exit_code == 0, (done.output, done.exception)
    assert edited == ["1 s0", "1 s0", "0 s0", "0 s0", "0 s0"], "only what was interrupted is edited again"
    again, children = runs()
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    assert {name: run.info.status for name, run in children.items()} == {"MMD-s RBF": "FINISHED", "none": "FINISHED"}
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "study.json",
        "table.md",
        "table.csv",
        "plot.png",
        "study_table.json",
    }
    rows = [row for row in read_rows(parts(Workspace.of(out / "arms" / "none"))) if row["task"] == "vqa"]
    summary = json.loads((out / "arms" / "none" / "summary.json").read_text())
    assert children["none"].data.metrics["metrics/m_gen"] == pytest.approx(summary["metrics"]["m_gen"]["mean"])
    assert again.data.tags["mlflow.note.content"].startswith("# Table 4") and not again.data.metrics
    table = json.loads(Path(client.download_artifacts(again.info.run_id, "study_table.json")).read_text())
    (line,) = [
        entry for row in table["data"] if (entry := dict(zip(table["columns"], row, strict=True)))["column"] == "m_gen"
        and entry["task"] == "vqa" and "none" in entry.values()
    ]  # fmt: skip
    assert float(line["mean"]) == pytest.approx(rows[0]["m_gen"], abs=1e-5)
    assert children["none"].data.params["objective.generality_weight"] == "0.0"

    assert (out / "table.md").read_text() == done.stdout.removesuffix("\n")
    assert "# Table 4" in done.stdout and "**Questions**" in done.stdout
    assert f"\n\n    odedit study table4 --config {config} --out {out}\n\n" in done.stdout
    codes = {json.loads(path.read_text())["code"] for path in out.glob("arms/*/summary.json")}
    assert f"Code: odedit {', '.join(codes)}\n" in done.stdout and len(codes) == 1
    assert "MLflow:" in done.stderr and "table.csv" in done.stderr
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in out.glob("arms/*/results/*")}
    assert odedit(*command).exit_code == 0 and len(edited) == 5
    assert {path: path.stat().st_mtime_ns for path in out.glob("arms/*/results/*")} == before and len(before) == 4
    assert len(runs()[1]) == 2

    monkeypatch.setattr(actor, "edit", original)
    assert odedit(*command, "--fresh").exit_code == 0
    parents = [run for run in client.search_runs([experiment.experiment_id]) if PARENT_TAG not in run.data.tags]
    assert len(parents) == 2, "what starts over is another run, with children of its own"


def test_commands_list_the_studies_and_explain_wrong_names(tmp_path: Path) -> None:
    listed = odedit("study", "list")
    assert listed.exit_code == 0
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(spec.names())
    assert all(spec.load(line.split()[0], None).title in line for line in lines)
    for arguments, expected in (
        (("tabel1",), "Did you mean 'table1'?"),
        (("fig2", "plot.x=lamda"), "Did you mean 'lambda'?"),
        (("fig2", "settings.editor.clmp=1", "--out", tmp_path / "x"), "none, 0.001: editor.clmp: unknown key"),
        (("fig2", "--config", "none.yaml"), "none.yaml: the configuration cannot be read"),
    ):
        wrong = odedit("study", *arguments)
        assert wrong.exit_code == 2 and expected in wrong.stderr and "Traceback" not in wrong.output
    assert not (tmp_path / "x").exists(), "mistakes are found before anything is written"


@pytest.mark.usefixtures("shared_world")
def test_records_that_cannot_be_drawn_leave_nothing_behind(tmp_path: Path, small: dict[str, Any]) -> None:
    del small["settings"]["data"]
    study, out = study_of(small | {"draw": {"seeds": [0], "per_task": 10**6}}), tmp_path / "studies" / "one"
    for is_there in (False, True):
        if is_there:
            out.mkdir(parents=True)
        with pytest.raises(InputError, match=r"draw\.per_task: got 1000000"):
            runner.run("fig2", study, out, QUIET)
        assert list((tmp_path / "studies").rglob("*")) == [out] * is_there


def test_the_folder_of_something_else_is_refused(tmp_path: Path, small: dict[str, Any]) -> None:
    study = study_of(small)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        runner.run("fig2", study, tmp_path / "file", QUIET)
    with pytest.raises(InputError, match="is not empty and holds no study"):
        runner.run("fig2", study, tmp_path, QUIET)
    other = tmp_path / "other"
    other.mkdir()
    (other / "study.json").write_text(json.dumps({"study": "fig4"}))
    with pytest.raises(InputError, match="holds the study 'fig4', not 'fig2'"):
        runner.run("fig2", study, other, QUIET)
    assert [path.name for path in other.iterdir()] == ["study.json"]


def test_errors_name_the_arm_and_other_settings_are_refused(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    out = tmp_path / "study"
    wrong = small | {"axes": {"data": {"there": {}, "not there": {"data": {"path": "none.json"}}}}, "baseline": {}}
    wrong["plot"] = {"kind": "dots", "y": "data"}
    with pytest.raises(InputError, match=r"^not there: .*none\.json"):
        runner.run("fig2", study_of(wrong), tmp_path / "wrong", QUIET)
    found = runner.run("fig2", study_of(small), out, QUIET)
    assert found.tracking_uri is None and [(cell.task, cell.n) for cell in found.cells] == [("vqa", 2)] * 2
    changed = small | {"settings": small["settings"] | {"seed": 5}}
    with pytest.raises(InputError, match=r"(?s)^native: .*seed: was 0, now 5"):
        runner.run("fig2", study_of(changed), out, QUIET)
    files = [path.read_bytes() for path in found.files]
    assert [path.read_bytes() for path in runner.run("fig2", study_of(small), out, QUIET).files] == files


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"path": "none.json"}}, "there is no file"),
        ({"tracking": {"uri": "http://127.0.0.1:1"}}, "tracking.uri: no server answers"),
        ({"pipeline": {"ray_address": "127.0.0.1:1"}}, "pipeline.ray_address: no Ray answers"),
        ({"editor": {"name": "wise", "site": "layers.99.ffn.in"}}, "layers.99.ffn.in"),
    ],
)
def test_what_no_arm_can_do_is_said_before_anything_is_written_or_trained(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(runner.many, "with_weights", lambda *arguments: pytest.fail("training"))
    for section, values in changes.items():
        small["settings"][section] = small["settings"].get(section, {}) | values
    small["settings"]["tracking"] = small["settings"].get("tracking", {}) | {"enabled": True}
    with pytest.raises(InputError, match=expected):
        runner.run("fig2", study_of(small), tmp_path / "studies" / "one", QUIET)
    assert not (tmp_path / "studies").exists()


def test_a_study_without_an_edit_that_worked_says_so(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    small["settings"]["editor"] = {"name": "outside_editors.poisoned", "sites": ["layers.2.ffn.in"], "max_steps": 1}
    small["settings"]["objective"] = {"sigma2_0": 10.0, "own_weight": 1.0}
    records = json.loads(Path(small["settings"]["data"]["path"]).read_text())
    records = [record | {"edit_id": f"raise-{number}"} for number, record in enumerate(records)]
    Path(small["settings"]["data"]["path"]).write_text(json.dumps(records))
    with pytest.raises(NothingUsable, match="No record was edited"):
        runner.run("fig2", study_of(small), tmp_path / "study", QUIET)
    assert "0 (2 failed)" in (tmp_path / "study" / "table.md").read_text()


def test_the_picture_of_states_has_a_panel_before_and_one_after_each_arm(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    pictures: list[Any] = []
    clouds: list[tuple[np.ndarray, np.ndarray]] = []
    original_png, original_states = plots.to_png, states.hidden_states

    def to_png(picture: Any) -> bytes:
        pictures.append(picture)
        return original_png(picture)

    def of_run(workspace: Workspace) -> HiddenStates:
        found = original_states(workspace)
        clouds.append((found.before, found.after))
        return found

    monkeypatch.setattr(plots, "to_png", to_png)
    monkeypatch.setattr(states, "hidden_states", of_run)
    small["settings"]["data"]["limit"] = 3  # in two groups
    small["plot"] = {"kind": "states"}
    found = runner.run("fig3", study_of(small), tmp_path / "study", QUIET)
    assert [path.name for path in found.files] == ["table.md", "table.csv", "plot.png"]
    (picture,) = pictures
    assert [axes.get_title().splitlines()[0] for axes in picture.axes] == ["before", "native", "ODEdit"]
    for axes in picture.axes:
        assert [len(points.get_offsets()) for points in axes.collections] == [3, 3, 3]
        assert len(axes.lines) == 3 * 2, "from each edit to each of its two rephrases"
    (before, after), (before_too, after_too) = clouds
    assert before.shape[:2] == (3, 3) and np.array_equal(before, before_too)
    assert not np.allclose(before, after) and not np.allclose(after, after_too)

    small["settings"]["keep_edits"] = False
    with pytest.raises(InputError, match="keep_edits=true"):
        runner.run("fig3", study_of(small), tmp_path / "without", QUIET)


def test_models_of_each_size_and_way_are_made_once_and_resumed(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    made: list[str] = []
    original = engine.train

    def train(commit_job: Any, *rest: Any) -> None:
        made.append(commit_job.job.config.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        original(commit_job, *rest)

    monkeypatch.setattr(engine, "train", train)
    values = small | {
        "axes": {"way": {"joint": {"commit": {"steps": 2, "copies": 1}}}},
        "baseline": {},
        "models": {"sizes": [1, 2], "ways": ["joint", "sum"]},
        "columns": ["rel", "m_loc"],
        "plot": {"kind": "bands", "x": "facts", "colour": "way", "columns": ["rel"], "front": ["m_loc", "rel"]},
    }
    del values["settings"]["editor"]
    values["settings"]["objective"] = {"name": "native"}
    values["settings"]["stopping"] = {"max_steps": 1}
    values["settings"]["tracking"] = {"experiment": "scale"}
    out = tmp_path / "study"
    with pytest.raises(KeyboardInterrupt):
        runner.run("scale", study_of(values), out, QUIET)
    assert not (out / "table.md").exists()
    finished = runner.run("scale", study_of(values), out, QUIET)
    assert made == ["joint, 1", "joint, 2", "joint, 2", "sum, 1", "sum, 2"], "only what was interrupted is made again"
    assert [(cell.arm.name, cell.n) for cell in finished.cells] == [
        ("joint, 1", 1),
        ("joint, 2", 2),
        ("sum, 1", 1),
        ("sum, 2", 2),
    ]
    assert {file.name for file in finished.files} == {"table.md", "table.csv", "plot.png"}
    assert all((out / "arms" / arm / "model" / "config.json").exists() for arm in ("joint_1", "joint_2", "sum_2"))
    rows = list(read_rows(parts(Workspace.of(out / "arms" / "sum_2"))))
    assert finished.cells[3].means["rel"].mean == pytest.approx(sum(row["rel"] for row in rows) / 2)
    client = connect(f"sqlite:///{out}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "scale"]
    every = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in every if PARENT_TAG not in run.data.tags]
    children = {run.info.run_name: run for run in every if run is not parent}
    assert children.keys() == {"joint, 1", "joint, 2", "sum, 1", "sum, 2"}
    assert {run.data.tags[PARENT_TAG] for run in children.values()} == {parent.info.run_id}
    assert {run.info.status for run in every} == {"FINISHED"}
    assert children["sum, 2"].data.metrics["metrics/rel"] == pytest.approx(finished.cells[3].means["rel"].mean)
    runner.run("scale", study_of(values), out, QUIET)
    assert len(made) == 5

    wrong = values | {"axes": {"way": {"sum": {"editor": {"name": "tpatcher"}}}}}
    with pytest.raises(InputError, match=r"^sum, 1: editor\.name: got 'tpatcher'"):
        runner.run("scale", study_of(wrong), tmp_path / "wrong", QUIET)
    assert not (tmp_path / "wrong").exists()
