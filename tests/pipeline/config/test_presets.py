"""Presets: settings by model, below those of the user."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from odedit import InputError, backbones
from odedit.__main__ import app
from odedit.backbones.common import hub
from odedit.editors.base import PUBLISHED_LAYERS, fitting_site
from pipeline.config import presets
from pipeline.config.run import from_dict, load_commit


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_a_run_with_each_of_its_editors(name: str) -> None:
    preset = presets.find(name)
    for editor, own in {**preset.editors, "tpatcher": {}}.items():
        run = from_dict({"preset": name, "backbone": {"checkpoint": "model"}, "editor": {"name": editor}})
        assert run.preset == name and run.backbone.family in backbones.names()
        assert run.backbone.checkpoint == "model" and run.backbone.dtype == "bfloat16"
        assert {key: getattr(run.editor.settings, key) for key in own} == own and run.editor.given == set(own)
    assert preset.origin in str(preset) and preset.source in str(preset)


def test_a_derived_site_is_at_the_published_depth() -> None:
    """The same layer that fitting finds, also in a model that has a layer of the published number."""
    for preset in map(presets.find, presets.names()):
        layer = int(preset.editors["wise"]["site"].split(".")[1])
        if preset.layers > 23:
            assert layer == int((23 + 0.5) / PUBLISHED_LAYERS * preset.layers)
        else:
            assert fitting_site("layers.23.ffn.out", preset.layers).split(".")[1] == str(layer)
        assert preset.origin == "derived" or preset.layers == PUBLISHED_LAYERS


def test_settings_of_file_and_command_line_win() -> None:
    values = {
        "preset": "llava-1.5-7b",
        "backbone": {"dtype": "float16"},
        "editor": {"name": "ftl", "max_steps": 3},
    }
    run = from_dict(values)
    assert (run.backbone.family, run.backbone.checkpoint) == ("llava", "llava-hf/llava-1.5-7b-hf")
    assert (run.backbone.dtype, run.editor.settings.max_steps) == ("float16", 3)
    assert run.editor.settings.learning_rate == 1e-4
    again = from_dict(run.to_dict())
    assert again == run


def test_a_preset_leaves_the_editor_of_a_way_to_the_way() -> None:
    with_preset, without = (load_commit(None, texts) for texts in (["preset=qwen3-vl-8b"], []))
    assert with_preset.editor == without.editor and with_preset.commit == without.commit
    assert with_preset.backbone.family == "auto"


def test_an_unknown_preset_and_one_without_a_checkpoint_are_named() -> None:
    with pytest.raises(InputError, match=r"preset: .*'llava-1\.5-7b'"):
        from_dict({"preset": "llava-1.5"})
    with pytest.raises(InputError, match=r"`odedit convert minigpt4`, and set backbone\.checkpoint"):
        from_dict({"preset": "minigpt4"})


def test_presets_are_listed_with_their_origin() -> None:
    listed = CliRunner().invoke(app, ["presets"], env={"COLUMNS": "200"}).output
    for name in presets.names():
        (line,) = re.findall(rf"^\W*{re.escape(name)}\s.*$", listed, flags=re.MULTILINE)
        assert presets.find(name).origin in line


@pytest.mark.parametrize(
    "command", [["edit", "data.path=embedded:validation"], ["commit", "data.path=embedded:validation"]]
)
def test_without_network_a_dry_run_stops_where_the_checkpoint_is_needed(command, tmp_path, monkeypatch) -> None:
    def no_network(hub_id: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "_request_info", no_network)
    monkeypatch.setattr(hub, "_cached", lambda hub_id: None)
    arguments = [*command, "--preset", "qwen2.5-vl-7b", "--dry-run", f"out={tmp_path / 'out'}"]
    ran = CliRunner().invoke(app, [*arguments, "tracking.enabled=false"])
    assert ran.exit_code == 2
    assert "backbone.checkpoint 'Qwen/Qwen2.5-VL-7B-Instruct' is no folder here" in " ".join(ran.output.split())
    wrong = CliRunner().invoke(app, [*arguments, "editor.learning_rat=1"])
    assert wrong.exit_code == 2 and "learning_rat" in wrong.output, "settings are checked first"
