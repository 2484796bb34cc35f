"""`odedit commit commit.way=sequential` by the command, in this process: every editor, streams, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import parquet
from typer.testing import CliRunner

from odedit import editors, load_edited
from odedit.__main__ import app
from odedit.errors import InputError
from odedit.ways.common.files import load_committed
from pipeline.driver import commit as driver
from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace
from tests.support import inline_pipeline
from tests.support.mmedit_files import encoded, picture, record, write_array, write_images
from tests.support.small_editors import ready_editor, settings_for

SERVED = ("wise", "unike")
"""Editors whose edits no checkpoint can hold."""


@pytest.fixture
def given(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Five records, edited in a few steps one after another."""
    inline_pipeline.install(monkeypatch)
    return settings | {
        "editor": {"name": "ftl", "learning_rate": 1e-3},
        "objective": {"name": "native"},
        "stopping": {"max_steps": 2},
        "commit": {"way": "sequential", "retention": [1, 2, 4]},
    }


def odedit(*arguments: Any) -> str:
    """Output of a command that ends without an error."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def written(settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def table(out: Path, name: str) -> list[dict[str, Any]]:
    return parquet.read_table(out / f"{name}.parquet").to_pylist()


@pytest.mark.parametrize("name", sorted({*editors.names()} - {"residual"}))
def test_every_editor_by_the_command(given, backbone, tmp_path: Path, name: str) -> None:
    editor = ready_editor(name, backbone, tmp_path)
    section = {"name": name, **settings_for(name, backbone)}
    if getattr(editor.config, "checkpoint", None):
        section["checkpoint"] = editor.config.checkpoint
    given |= {"editor": section, "out": str(tmp_path / "out")}
    output = odedit("commit", "--config", written(given, tmp_path))
    assert "earlier edits, scored again" in output
    out = tmp_path / "out"
    rows = list(results.read_rows(results.parts(Workspace.of(str(out)))))
    assert [row["status"] for row in rows] == ["edited"] * 5
    assert all(row["steps"] is not None and row["stop_reason"] and row["worst_nll"] is not None for row in rows)
    made = table(out, "sequence")
    assert [row["position"] for row in made] == [1, 2, 3, 4, 5]
    assert all(row["seconds"] > 0 and 0 <= row["t_loc_step"] <= 1 and 0 <= row["rel"] <= 1 for row in made)
    assert [row["edits"] for row in table(out, "retention")] == [1, 2, 2, 4, 4, 4, 4]
    assert "Earlier edits, scored again" in (out / "report.html").read_text()
    model = out / "model"
    assert (model / "parameters.safetensors").exists() == (name in SERVED)
    assert (model / "model.safetensors").exists() != (name in SERVED)
    assert (out / "adapter").exists() == (name == "lora")
    served, listed = load_edited(model), json.loads((model / "edits.json").read_text())["edits"]
    roots = Path(given["data"]["image_root"])
    answers = [served.answer(roots / entry["image"], entry["prompt"]) for entry in listed]
    assert answers == [row["answer_after"].removesuffix(" ...") for row in rows] or any(
        row["answer_after"].endswith(" ...") for row in rows
    )
    if name in SERVED:
        with pytest.raises(InputError, match="act in `answer` alone"):
            served.generate()


@pytest.mark.parametrize(
    ("editor", "objective"),
    [
        ({"name": "ftl", "learning_rate": 1e-3}, {"name": "odedit", "warmup": 0.0, "ramp": 0.0, "sigma2_0": 50.0}),
        ({"name": "wise", "site": "layers.2.ffn.in", "shard_edits": 2}, {"name": "native"}),
    ],
    ids=["ftl", "wise"],
)
def test_records_that_arrive_later_end_in_the_model_of_all_at_once(given, tmp_path: Path, editor, objective) -> None:
    given |= {"editor": editor, "objective": objective}
    records = [record(number, edit_id=f"old-{number}") for number in range(5)]  # draws are those of an id
    write_array(Path(given["data"]["path"]), records)
    more = [record(number, edit_id=f"new-{number}") for number in range(5, 9)]
    others = [record(number, edit_id=f"pool-{number}") for number in range(20, 26)]
    write_images(tmp_path, [*more, *others])
    # Without a pool, supervision is drawn from the run's own records, of which the first run has fewer.
    given["data"]["pool"] = str(write_array(tmp_path / "pool.json", others))
    both = write_array(tmp_path / "both.json", [*records, *more])
    added = write_array(tmp_path / "more.json", more)
    odedit("commit", "--config", written(given, tmp_path))
    odedit("commit", "--change", given["out"], "--add", added, f"out={tmp_path / 'stream'}")
    odedit("commit", "--config", written(given | {"out": str(tmp_path / "whole")}, tmp_path), f"data.path={both}")
    stream, whole = (load_committed(tmp_path / name / "committed.safetensors") for name in ("stream", "whole"))
    assert len(stream[1].edit_ids) == 9
    assert stream[0].keys() == whole[0].keys()
    for name, value in whole[0].items():
        assert torch.equal(value, stream[0][name]), name
    assert stream[1].details["curves"] == whole[1].details["curves"]
    steps = [
        [row["steps"] for row in results.read_rows(results.parts(Workspace.of(str(tmp_path / name))))]
        for name in ("stream", "whole")
    ]
    assert steps[0] == steps[1]


def test_a_record_that_others_were_edited_on_top_of_cannot_be_removed(given, tmp_path: Path) -> None:
    odedit("commit", "--config", written(given, tmp_path))
    first = load_committed(Path(given["out"]) / "committed.safetensors")[1].edit_ids[0]
    config = driver.changed(given["out"], [first], None, [f"out={tmp_path / 'less'}"])
    with pytest.raises(InputError, match=r"commit.remove: .* cannot be taken out of the model .* on top of it"):
        driver.check(config, None)
    assert not (tmp_path / "less").exists()


def test_three_fields_are_enough(given, tmp_path: Path) -> None:
    """No pool, no other setting: the way's editor and objective, with supervision that is made."""
    lines = ["image,question,answer"]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
        lines.append(f"{number}.png,what is this?,dog {number}")
    path = tmp_path / "records.csv"
    path.write_text("\n".join(lines))
    out = tmp_path / "few"
    quick = ("stopping.max_steps=3", "tracking.enabled=false", "evaluation.generate=false")
    odedit("commit", f"data.path={path}", "commit.way=sequential", f"out={out}", *quick)
    rows = list(results.read_rows(results.parts(Workspace.of(str(out)))))
    assert [(row["status"], row["editor"], row["objective"]) for row in rows] == [
        ("edited", "tpatcher", "contrast")
    ] * 3
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["text_config"]["ffn_dim"] > 512, "neurons are units of a wider network"
