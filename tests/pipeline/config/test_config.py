"""Configuration: valid values are accepted, and every mistake is explained on its own line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from odedit import world
from odedit.errors import InputError
from pipeline.config.run import RunConfig, apply_override, from_dict, load
from pipeline.config.values import masked_values


def message(values: dict) -> str:
    with pytest.raises(InputError) as caught:
        from_dict(values)
    return str(caught.value)


def test_the_defaults_are_wise_on_blip2_under_odedit() -> None:
    config = from_dict({})
    assert (config.editor.name, config.backbone.family, config.objective.name) == ("wise", "blip2", "odedit")


@pytest.mark.parametrize(("checkpoint", "family"), [("blip2", "blip2"), ("minigpt4", "minigpt4"), ("llava", "auto")])
def test_a_checkpoint_says_its_family_where_none_is_named(checkpoint: str, family: str) -> None:
    path = str(world.checkpoint_path(checkpoint))
    assert load(None, [f"backbone.checkpoint={path}"]).backbone.family == family
    for named in ("auto", "my.module"):
        assert from_dict({"backbone": {"checkpoint": path, "family": named}}).backbone.family == named
    with pytest.raises(InputError, match="'nowhere/at/all' does not exist"):
        load(None, ["backbone.checkpoint=nowhere/at/all"])


def test_a_resolved_configuration_builds_itself_again(tmp_path: Path) -> None:
    config = from_dict({"editor": {"name": "ftl"}, "objective": {"bandwidths": [0.5, 1]}, "seed": 3})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"editr": {}}, "editr: unknown key. Did you mean 'editor'?"),
        ({"pipeline": {"actor": 2}}, "pipeline.actor: unknown key. Did you mean 'actors'?"),
        ({"editor": {"name": "wize"}}, "editor.name: Unknown editor 'wize'. Did you mean 'wise'?"),
        ({"backbone": {"family": "blip"}}, "Unknown backbone 'blip'. Did you mean 'blip2'?"),
        ({"backbone": {"family": "qwen2_5_vl"}}, "backbone.family: 'qwen2_5_vl' is no family any more"),
        ({"editor": {"clmp": 1}}, "editor.clmp: unknown key. Did you mean 'clamp'?"),
        ({"editor": {"mask_ratio": 1.5}}, "editor.mask_ratio: got 1.5, expected a finite number > 0 and <= 1."),
        ({"editor": {"max_steps": "ten"}}, "editor.max_steps: got 'ten', expected a whole number >= 1."),
        ({"editor": {"max_steps": 2.5}}, "editor.max_steps: got 2.5, expected a whole number >= 1."),
        ({"editor": {"max_steps": True}}, "editor.max_steps: got True, expected a whole number >= 1."),
        ({"editor": "wise"}, "editor: got 'wise', expected a section"),
        ({"objective": {"name": "odedt"}}, "objective.name: Unknown objective 'odedt'. Did you mean 'odedit'?"),
        ({"objective": {"name": "native", "warmup": -1}}, "objective.warmup: got -1"),
        ({"objective": {"name": "native", "negatives": 1}}, "objective.negatives: got 1, expected at least"),
        ({"objective": {"name": "native", "warmpu": 0.1}}, "objective.warmpu: unknown key. Did you mean 'warmup'?"),
        ({"objective": {"multiplier": {"depht": 2}}}, "objective.multiplier.depht: unknown key. Did you mean 'depth'?"),
        ({"objective": {"penalty": "fixed:x"}}, "objective.penalty: got 'fixed:x'"),
        ({"pipeline": {"actors": 0}}, "pipeline.actors: got 0, expected 'auto' or a whole number >= 1."),
        ({"pipeline": {"actors": "many"}}, "pipeline.actors: got 'many', expected 'auto' or a whole number >= 1."),
        ({"data": {"path": "embedded:evalution"}}, "Did you mean 'evaluation'?"),
        ({"data": {"template": "mmedt"}}, "data.template: Unknown prompt template 'mmedt'. Did you mean 'mmedit'?"),
        ({"data": 3}, "data: got 3, expected a section"),
        ({"supervision": {"locality_source": "records"}}, "supervision.locality_source: got 'records'"),
        ({"editor": {"clamp": None, "mask_ratio": 1.0}, "objective": {"multiplier": {"input": "flat"}}},
         "objective.multiplier.input: got 'flat', but with these settings of the editor"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_what_is_right(values: dict, expected: str) -> None:
    assert expected in message(values)


def test_all_mistakes_are_reported_at_once() -> None:
    lines = message({"editor": {"name": "wise", "clamp": -1}, "pipeline": {"actor": 1}, "seed": "x"}).splitlines()
    assert len(lines) == 3


def test_overrides_are_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("editor: {name: wise}\n")
    config = load(path, ["editor.learning_rate=1e-3", "data.limit=7", "objective.multiplier.depth=2", "data.pool="])
    assert config.editor.settings.learning_rate == 1e-3
    assert (config.data.limit, config.objective.settings.multiplier.depth, config.data.pool) == (7, 2, None)


@pytest.mark.parametrize("text", ["10.0.0.2:6379", "1.2.3", "1e5x", "1.5 GiB", "-1.0-2"])
def test_what_only_begins_like_a_number_is_text(text: str) -> None:
    values: dict[str, Any] = {}
    apply_override(values, f"pipeline.ray_address={text}")
    assert values == {"pipeline": {"ray_address": text}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("editor: [", "line 1"),
        ("- 1", "expected sections"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_broken_file_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="run.yaml") as caught:
        load(path)
    assert expected in str(caught.value)


def test_a_missing_file_and_an_override_without_value_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"expected key\.sub=value"):
        load(None, ["editor.max_steps"])
    with pytest.raises(InputError, match="seed is not a section"):
        load(None, ["seed=1", "seed.x=2"])


def test_secrets_are_masked_wherever_settings_are_stored() -> None:
    config: RunConfig = from_dict({"tracking": {"uri": "https://me:secret@mlflow.example"}})
    assert "secret" not in str(masked_values(config.to_dict()))


def test_a_misspelt_editor_key_is_held_against_name_too():
    with pytest.raises(InputError) as caught:
        from_dict({"editor": {"nmae": "ftl", "mask_ration": 0.5}})
    assert "editor.nmae: unknown key. Did you mean 'name'?" in str(caught.value)
    assert "editor.mask_ration: unknown key. Did you mean 'mask_ratio'?" in str(caught.value)
