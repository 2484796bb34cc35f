"""Model and editor are checked together before a run starts, and default settings are fitted to the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from odedit import InputError, load_backbone
from odedit.__main__ import app
from odedit.editors import find
from odedit.editors.common.weights import save_weights
from pipeline.config.checkpoints import fitted, memory
from pipeline.config.run import RunConfig, commit_from_dict, from_dict
from pipeline.driver.preflight import prepare
from pipeline.workers import ray_session
from tests.support import tiny_current, tiny_models


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(*_: object) -> None:
        raise AssertionError("Ray was to be started")

    monkeypatch.setattr(ray_session, "connected", connected)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two layers."""
    return tiny_models.write("llava", tmp_path_factory.mktemp("models") / "llava")


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def expect(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    for part in parts:
        assert part in result.output


def run_of(checkpoint: Path, **editor: Any) -> RunConfig:
    return from_dict({"backbone": {"family": "llava", "checkpoint": str(checkpoint)}, "editor": editor})


def test_a_default_site_moves_to_the_same_depth_and_a_given_one_is_refused(llava: Path) -> None:
    config, notes = fitted(from_dict({}))
    assert config.editor.settings.site == "layers.2.ffn.in" and len(notes) == 1
    assert "the default layers.23.ffn.in is for other models; this one has 4 layers of attention.q, " in notes[0]
    assert notes[0].endswith(", ffn.out, and layers.2.ffn.in is used.")
    assert fitted(run_of(llava))[0].editor.settings.site == "layers.1.ffn.in"
    with pytest.raises(InputError, match=r"'layers.23.ffn.in': expected layers.<0..3>.<part>"):
        fitted(from_dict({"editor": {"name": "wise", "site": "layers.23.ffn.in"}}))
    given = from_dict({"editor": {"name": "wise", "site": "layers.1.ffn.out"}})
    assert fitted(given) == (given, [])


def test_other_defaults_give_way_as_well(llava: Path) -> None:
    mend, notes = fitted(run_of(llava, name="mend"), trains=True)
    layers = [site.split(".")[1] for site in mend.editor.settings.sites]
    assert sorted(layers) == ["-1", "-1", "-2", "-2"] and len(notes) == 1
    unike, notes = fitted(run_of(llava, name="unike"), trains=True)
    assert unike.editor.settings.num_layers == 2 and len(notes) == 1
    with pytest.raises(InputError, match="editor.num_layers: got 3, the text model has 2 layers"):
        fitted(run_of(llava, name="unike", num_layers=3), trains=True)
    assert fitted(run_of(llava, name="ftl"))[1] == []


def test_a_default_site_moves_to_the_matrix_that_holds_it_and_a_given_one_is_refused(tmp_path: Path) -> None:
    """Of a model with one matrix for queries, keys and values, and one for gate and input."""
    checkpoint = tiny_current.write("llava_phi3", tmp_path)
    backbone, last = {"family": "auto", "checkpoint": str(checkpoint)}, ("layers.-1.ffn.gate_in", "layers.-1.ffn.out")

    def settings(**editor: Any) -> Any:
        return fitted(from_dict({"backbone": backbone, "editor": editor}), trains=True)[0].editor.settings

    assert settings(name="wise").site == "layers.1.ffn.gate_in"
    assert settings(name="ftl").sites == last and set(settings(name="mend").sites) > set(last)
    assert settings(name="lora").sites == ("layers.*.attention.qkv",)
    for name in ("tpatcher", "unike"):
        settings(name=name)
    with pytest.raises(
        InputError, match=r"'layers\.0\.attention\.q': .* one of attention\.qkv, attention\.out, ffn\.gate_in"
    ):
        settings(name="lora", sites=["layers.*.attention.q"])
    joint = commit_from_dict({"backbone": backbone, "commit": {"way": "joint"}})
    parts = ("attention.qkv", "attention.out", "ffn.gate_in", "ffn.out")
    assert fitted(joint)[0].editor.settings.sites == tuple(f"layers.*.{part}" for part in parts)
    assert memory(fitted(joint)[0]) is not None
    routed = commit_from_dict({"backbone": backbone, "commit": {"way": "routed"}})
    assert fitted(routed)[0].editor.settings.sites == ("layers.25%.ffn.gate_in", "layers.25%.ffn.out")


def test_a_run_goes_on_with_the_site_that_it_has_found(settings: dict[str, Any]) -> None:
    settings["editor"] = {}
    ready = prepare(from_dict(settings))
    assert ready.config.editor.settings.site == "layers.2.ffn.in" and len(ready.notes) == 1
    written = yaml.safe_load(ready.workspace.config.read_text())
    assert written["editor"]["site"] == "layers.2.ffn.in"
    assert prepare(from_dict(settings)).config == ready.config
    assert prepare(from_dict(written)).notes == (), "its own configuration names the site"


def test_the_command_says_which_site_it_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"editor": {}}))
    result = odedit("edit", "--config", path, "--dry-run")
    expect(result, 0)
    assert yaml.safe_load(result.stdout)["editor"]["site"] == "layers.2.ffn.in"
    assert "layers.23.ffn.in is for other models" in result.stderr
    expect(odedit("edit", "--config", path, "editor.site=layers.23.ffn.in", "--dry-run"), 2, "expected layers.<0..3>")


@pytest.mark.parametrize("command", [["edit"], ["edit", "--dry-run"], ["train", "mend"]], ids=" ".join)
def test_a_checkpoint_that_lacks_a_tensor_starts_nothing(
    command: list[str], settings: dict[str, Any], llava: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llava.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    path = tmp_path / "run.yaml"
    records = {"path": "embedded:train", "validation": "embedded:validation"}
    changed = {"backbone": {"family": "llava", "checkpoint": str(broken)}, "editor": {}, "training": records}
    path.write_text(yaml.safe_dump(settings | changed))
    result = odedit(*command, "--config", path)
    expect(result, 2, "1 tensor of 88 missing (model.language_model.norm.weight)")
    assert not Path(settings["out"]).exists() and not result.stdout


@pytest.mark.parametrize("name", ["mend", "unike"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "1 missing"),
        ("unexpected", "1 unexpected"),
        ("another shape", "1 of another shape"),
        ("NaN", "1 with NaN or infinite values"),
    ],
)
def test_an_editors_own_weights_are_looked_through(
    name: str, change: str, words: str, llava: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    config, _ = fitted(run_of(llava, name=name), trains=True)
    editor = find(name)(config.editor.settings)
    model = load_backbone("llava", str(llava))
    weights = editor.initial_weights(model, 0)
    last = sorted(weights)[-1]
    if change == "missing":
        del weights[last]
    elif change == "unexpected":
        weights["other"] = weights[last].clone()
    elif change == "another shape":
        weights[last] = weights[last][:-1]
    else:
        weights[last].view(-1)[0] = float("nan")
    path = tmp_path / "weights.safetensors"
    save_weights(path, weights, name, editor.weight_settings, model.fingerprint)
    values = settings | {
        "backbone": {"family": "llava", "checkpoint": str(llava)},
        "editor": {"name": name, "checkpoint": str(path)},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    result = odedit("edit", "--config", tmp_path / "run.yaml", "--dry-run")
    expect(result, 2, words)


def test_an_editor_and_a_family_of_yesterdays_protocol_are_checked_by_the_workers(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(llava, name="outside.gains")
    assert not hasattr(find("outside.gains"), "fitted") and fitted(config) == (config, [])

    def check(editor: Any, model: Any) -> None:
        assert float(model.site("layers.0.ffn.in").weight.sum()) != 0

    monkeypatch.setattr(find("outside.gains"), "check", check)
    assert fitted(config) == (config, []), "values that a model without weights lacks"
    with pytest.raises(InputError, match="expected layers.<0..1>.<part>"):
        monkeypatch.setattr(find("outside.gains"), "check", lambda editor, model: model.site("layers.7.ffn.in"))
        fitted(config)
    processors = []
    family = SimpleNamespace(load_processor=processors.append)
    monkeypatch.setattr("outside.terse_llava.BACKBONE", family)
    config = replace(config, backbone=replace(config.backbone, family="outside.terse_llava"))
    assert fitted(config) == (config, []) and processors == [str(llava)]


@pytest.mark.parametrize("name", ["mend", "unike"])
def test_an_editors_check_draws_no_weights(name: str, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = fitted(run_of(llava, name=name), trains=True)
    editor = find(name)(config.editor.settings)
    model = load_backbone("llava", str(llava))
    seen: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(editor, "_loaded", lambda *_: {})
    module = f"odedit.editors.{name}"
    monkeypatch.setattr(f"{module}.check_tensors", lambda path, weights, expected: seen.update(expected))
    editor.check(model)
    shapes = {name: value.shape for name, value in editor.initial_weights(model, 0).items()}
    assert {name: value.shape for name, value in seen.items()} == shapes
    assert {value.device.type for value in seen.values()} == {"meta"}


def test_a_model_is_read_after_what_costs_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr("pipeline.driver.preflight.fitted", read)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out"):
        prepare(from_dict(settings | {"out": str(tmp_path / "file")}))
