"""Settings of studies: arms from axes, messages for mistakes, and drawn records."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from odedit import InputError, editors, load_backbone, ways
from odedit.backbones import Backbone
from odedit.editors.base import Trainable
from pipeline.config import strict
from pipeline.run_folder.sources import embedded_name
from pipeline.study import data, spec
from pipeline.study import run as runner
from pipeline.study.spec import Draw, StudyConfig, arms, load, run_config

TABLE = {
    "title": "Two axes",
    "settings": {"editor": {"name": "wise", "site": "layers.2.ffn.in", "clamp": 0.5}, "seed": 1},
    "axes": {
        "editor": {"WISE": {}, "FT-L": {"editor": {"name": "ftl", "learning_rate": 0.002}}},
        "rate": {"low": {"seed": 2}, "high": {"editor": {"learning_rate": 0.1}}},
    },
}


def study(**changes: Any) -> StudyConfig:
    return strict.build(StudyConfig, TABLE | changes)


def write(folder: Path, values: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_arms_are_the_combinations_without_the_skipped_ones() -> None:
    assert [arm.name for arm in arms(study())] == ["WISE, low", "WISE, high", "FT-L, low", "FT-L, high"]
    left = arms(study(skip=[{"editor": ["FT-L"], "rate": ["low", "high"]}, {"rate": ["high"]}]))
    assert [arm.labels for arm in left] == [{"editor": "WISE", "rate": "low"}]
    with pytest.raises(InputError, match="no combination is left"):
        arms(study(skip=[{"rate": ["low", "high"]}]))
    with pytest.raises(InputError, match="expected at least one axis"):
        arms(study(axes={}))


def test_later_settings_win_special_ones_last_and_another_editor_brings_its_own() -> None:
    special = [
        {"when": {"rate": ["high"]}, "set": {"seed": 7}},
        {"when": {"rate": ["high"], "editor": ["FT-L"]}, "set": {"seed": 8, "editor": {"learning_rate": 0.3}}},
    ]
    values = {arm.name: arm.values for arm in arms(study(special=special))}
    assert values["WISE, low"] == {"editor": TABLE["settings"]["editor"], "seed": 2}
    assert values["WISE, high"] == {"editor": TABLE["settings"]["editor"] | {"learning_rate": 0.1}, "seed": 7}
    assert values["FT-L, low"] == {"editor": {"name": "ftl", "learning_rate": 0.002}, "seed": 2}
    assert values["FT-L, high"] == {"editor": {"name": "ftl", "learning_rate": 0.3}, "seed": 8}


def test_folders_are_plain_names_and_never_shared() -> None:
    axes = {"x": {"ODEdit (record), β=0.1": {}, "..": {}, "a/../b": {}}}
    folders = [arm.folder for arm in arms(study(axes=axes))]
    assert folders == ["ODEdit-record-0.1", "-", "a-..-b"]
    with pytest.raises(InputError, match=r"'a b' and 'a-b' would share the folder 'a-b'"):
        arms(study(axes={"x": {"a b": {}, "a-b": {}}}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"baseline": {"lamda": "adaptive"}}, "Unknown axis 'lamda'. Did you mean 'lambda'?"),
        ({"baseline": {"multiplier": "fixd"}}, "baseline.multiplier 'fixd'. Did you mean 'fixed'?"),
        ({"plot": {"x": "lam"}}, "Unknown axis 'lam'"),
        ({"plot": {"x": "multiplier", "reference": "fixd"}}, "plot.reference 'fixd'. Did you mean 'fixed'?"),
        ({"plot": {"kind": "heatmap"}}, "a heat map needs the axes x and y"),
        ({"plot": {"kind": "pie"}}, "plot.kind: got 'pie'"),
        ({"skip": [{"editor": ["WISE"]}]}, "Unknown axis 'editor'"),
        ({"skip": [{"lambda": ["2"]}]}, "'skip' or 'special' '2'"),
        ({"special": [{"when": {"lambda": ["one"]}, "set": {}}]}, "'skip' or 'special' 'one'"),
        ({"colums": ["rel"]}, "colums: unknown key. Did you mean 'columns'?"),
        ({"draw": {"seeds": [0, 0]}}, "expected different seeds"),
        ({"draw": {"split": "evalution"}}, "Did you mean 'evaluation'?"),
        ({"axes": ["lambda"]}, "axes: got ['lambda'], expected axis -> label -> settings"),
        ({"axes": {"lambda": ["a"]}}, "axes: got"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load("fig2", write(tmp_path, changes))
    assert expected in str(caught.value)


def test_an_unknown_study_and_an_arm_with_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Unknown study 'tabel1'. Did you mean 'table1'"):
        load("tabel1", None)
    wrong = load("fig2", None, ["settings.editor.clmp=1"])
    with pytest.raises(InputError, match=r"^none, 0\.001: editor\.clmp: unknown key. Did you mean 'clamp'"):
        run_config(arms(wrong)[0], tmp_path, None)


def test_a_user_changes_settings_key_by_key_and_axes_as_a_whole(tmp_path: Path) -> None:
    changes = {
        "draw": {"per_task": 3},
        "axes": {"backbone": None, "editor": {"WISE": {"editor": {"name": "wise", "site": "layers.2.ffn.in"}}}},
        "settings": {"stopping": {"max_steps": 7}},
    }
    changed = load("table1", write(tmp_path, changes), ["title=short", "draw.seeds=[4]"])
    assert (changed.title, changed.draw) == ("short", Draw(per_task=3, seeds=(4,)))
    assert list(changed.axes) == ["editor", "objective"] and list(changed.axes["editor"]) == ["WISE"]
    # `skip` and `special` may name labels that the user has left out.
    assert len(arms(changed)) == len(load("table1", None).axes["objective"])
    assert (
        changed.settings["stopping"]["worst_token_nll"] == load("table1", None).settings["stopping"]["worst_token_nll"]
    )
    assert {arm.values["stopping"]["max_steps"] for arm in arms(changed)} == {7}


@pytest.fixture(scope="module")
def models(backbone: Backbone) -> dict[str, Backbone]:
    return {"blip2": backbone}


@pytest.mark.parametrize("name", spec.names())
def test_every_arm_of_every_study_that_ships_fits_its_model(
    name: str, models: dict[str, Backbone], tmp_path: Path
) -> None:
    shipped = load(name, None)
    assert shipped.settings["tracking"]["experiment"] == name
    for arm in arms(shipped):
        config = run_config(arm, tmp_path, None)
        family = config.backbone.family
        if family not in models:
            models[family] = load_backbone(family, config.backbone.checkpoint)
        editor = editors.find(config.editor.name)(config.editor.settings)
        # The weights are trained by the study itself, so they are left out here.
        (editor.with_weights({}) if isinstance(editor, Trainable) else editor).check(models[family])


def test_the_studies_use_every_editor(tmp_path: Path) -> None:
    configs = [run_config(arm, tmp_path, None) for name in spec.names() for arm in arms(load(name, None))]
    assert {config.editor.name for config in configs} == set(editors.names())


@pytest.fixture(scope="module")
def folder(worlds: dict[int, dict[str, Path]]) -> Path:
    """A folder that holds the embedded benchmark."""
    return worlds[0]["images"].parent.parent


@pytest.fixture(scope="module")
def drawn(folder: Path) -> tuple[Path, dict[str, str], list[dict[str, Any]]]:
    section = data.write(Draw(split="evaluation", seeds=(0, 1), per_task=72), folder)
    return folder, section, json.loads(Path(section["path"]).read_text())


def test_drawn_edits_have_ids_of_their_own_and_facts_in_common(drawn: Any) -> None:
    _, _, records = drawn
    assert len(records) == 2 * 2 * 72 == len({record["edit_id"] for record in records})
    by_seed = {seed: [record for record in records if record["edit_id"].startswith(f"s{seed}-")] for seed in (0, 1)}
    assert Counter(record["task"] for record in by_seed[1]) == {"vqa": 72, "caption": 72}
    assert {record["fact"] for record in by_seed[0]} == {record["fact"] for record in by_seed[1]}
    assert [record["alt"] for record in by_seed[0]] != [record["alt"] for record in by_seed[1]]


def test_a_fact_has_a_second_edit_only_after_every_fact_had_one(folder: Path) -> None:
    few = data.write(Draw(per_task=20), folder)
    for task in ("vqa", "caption"):
        facts = [record["fact"] for record in json.loads(Path(few["path"]).read_text()) if record["task"] == task]
        assert len(set(facts)) == len(facts) == 20
    many = json.loads(Path(data.write(Draw(per_task=60), folder)["path"]).read_text())
    # Captions cover fewer facts than are drawn.
    assert set(Counter(record["fact"] for record in many if record["task"] == "caption").values()) == {2, 3}
    with pytest.raises(
        InputError, match=r"draw\.per_task: got 73; the evaluation split has 72 edits of task 'caption'"
    ):
        data.write(Draw(per_task=73), folder)


def test_without_a_number_every_edit_is_drawn(folder: Path) -> None:
    section = data.write(Draw(split="validation", seeds=(0, 1), per_task=None), folder)
    records = json.loads(Path(section["path"]).read_text())
    assert Counter(record["task"] for record in records) == {"vqa": 2 * 108, "caption": 2 * 36}
    assert Path(section["path"]).name == "validation-seeds-0-1-all.json"


def test_one_edit_of_each_fact_is_the_first_in_the_order_of_the_benchmark(folder: Path) -> None:
    section = data.write(Draw(seeds=(1,), per_task=None, per_fact=1), folder)
    drawn = [record["edit_id"] for record in json.loads(Path(section["path"]).read_text())]
    every = json.loads((folder / embedded_name(1) / "evaluation.json").read_text())
    first = {record["fact"]: record["edit_id"] for record in reversed(every)}
    assert drawn == [f"s1-{r['edit_id']}" for r in every if first[r["fact"]] == r["edit_id"]] and len(drawn) == 96


def test_models_are_made_for_every_way_size_and_seed_and_tabled_without_the_seed(tmp_path: Path) -> None:
    scale = load("scale", None, ["models.sizes=[1, 8]", "draw.seeds=[0, 3]", "models.ways=[sum, joint]"])
    every = spec.runs(scale)
    assert [part.folder for part, _ in every][:4] == ["sum_1_0", "sum_1_3", "sum_8_0", "sum_8_3"]
    assert [arm.folder for _, arm in every] == [part.folder.rpartition("_")[0] for part, _ in every]
    configs = [run_config(part, tmp_path, {"path": "records.json"}) for part, _ in every]
    assert [config.commit_way for config in configs] == ["sum"] * 4 + ["joint"] * 4
    assert {(config.commit_way, config.editor.name) for config in configs} == {("sum", "ftl"), ("joint", "lora")}
    assert [config.data.limit for config in configs] == [1, 1, 8, 8] * 2
    assert spec.runs(load("fig2", None)) == [(arm, arm) for arm in arms(load("fig2", None))]
    mine = {"axes": {"way": {"mine": {"commit": {"way": "joint", "steps": 3}}, "joint": {"seed": 4}}}}
    own = load("scale", write(tmp_path, mine))
    assert list(own.axes["way"]) == [*ways.names(), "mine"]
    values = {arm.labels["way"]: arm.values for arm in arms(own)}
    assert values["mine"]["commit"] == {"way": "joint", "steps": 3}
    assert (values["joint"]["commit"], values["joint"]["seed"]) == ({"way": "joint"}, 4)
    assert list(load("scale", write(tmp_path, mine), ["models.ways=[mine]"]).axes["way"]) == ["mine"]


def test_ways_without_the_baselines_are_not_tested_against_it() -> None:
    assert load("scale", None, ["models.ways=[sum, joint]"]).baseline == {"way": "joint"}
    assert load("scale", None, ["models.ways=[sum, bulk]"]).baseline == {}
    with pytest.raises(InputError, match="baseline.way 'jiont'. Did you mean 'joint'"):
        load("scale", None, ["models.ways=[sum, joint]", "baseline.way=jiont"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("models.sizes=[]", "models.sizes: got [], expected numbers of facts"),
        ("models.sizes=[0]", "models.sizes: got [0]"),
        ("draw.per_task=3", "per_fact: got 1; expected at least 1, and per_task: null"),
        ("plot.front=[rel]", "front: got ['rel']; expected two columns"),
        ("plot.x=way", "plot: bands need numbers above 0 as labels of their axis x; got 'bulk'"),
    ],
)
def test_a_mistake_about_models_is_named(override: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load("scale", None, [override])
    assert expected in str(caught.value)


def test_each_seed_has_records_of_its_own_and_too_few_are_refused(folder: Path) -> None:
    scale = load("scale", None, ["draw.seeds=[0, 1]", "models.sizes=[96]", "models.ways=[sum, joint]"])
    parts = [part for part, _ in spec.runs(scale)]
    sections = runner._drawn(scale, parts, str(folder))
    seeds = [json.loads(Path(section["path"]).read_text())[0]["edit_id"][:2] for section in sections if section]
    assert seeds == ["s0", "s1"] * 2
    with pytest.raises(InputError, match=r"models\.sizes: got 97; 96 records of the evaluation split are drawn"):
        runner._drawn(load("scale", None, ["models.sizes=[97]", "draw.seeds=[0]"]), parts[:1], str(folder))


def test_every_picture_of_drawn_records_and_of_the_pool_is_there(drawn: Any) -> None:
    folder, section, records = drawn
    pool = json.loads(Path(section["pool"]).read_text())
    assert section["image_root"] == section["rephrase_root"] == str(folder)
    named = set()
    for record in records + pool:
        named |= {record["image"], record["m_loc"], record["image_rephrase"]}
        probes = [*record["probes"].values(), *record["held_out"].values()]
        named |= {probe["image"].removeprefix("rephrase:") for probe in probes if probe.get("image")}
    assert len(named) > 1000 and all((folder / name).is_file() for name in named)


def test_the_pool_is_the_training_split(drawn: Any) -> None:
    folder, section, _ = drawn
    training = json.loads((folder / embedded_name() / "train.json").read_text())
    pool = json.loads(Path(section["pool"]).read_text())
    assert [record["edit_id"] for record in pool] == [record["edit_id"] for record in training]


def test_the_same_records_again_leave_their_files_alone(drawn: Any) -> None:
    folder, section, _ = drawn
    files = [Path(section["path"]), Path(section["pool"])]
    before = [file.stat().st_mtime_ns for file in files]
    assert data.write(Draw(split="evaluation", seeds=(0, 1), per_task=72), folder) == section
    assert [file.stat().st_mtime_ns for file in files] == before


def test_the_study_shown_in_the_readme_is_a_valid_one() -> None:
    readme = (Path(runner.__file__).parent / "README.md").read_text(encoding="utf-8")
    start = readme.index("    title: the learning rate of FT-L")
    values = yaml.safe_load(textwrap.dedent(readme[start : readme.index("\n\n", start)]))
    study = strict.build(StudyConfig, values)
    spec._check(study, {})
    assert [arm.name for arm in arms(study)] == ["slow", "fast"] and study.baseline == {"rate": "slow"}
    assert all(run_config(arm, "out", None).editor.name == "ftl" for arm in arms(study))


def test_the_pages_of_results_are_linked_and_name_studies_that_ship() -> None:
    folder = Path(runner.__file__).parent
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in spec.names())
    pages = sorted((folder / "results").glob("*.md"))
    assert [page.name for page in pages] == ["ablations.md", "contrast.md", "fronts.md", "one-model.md", "table1.md"]
    for page in pages:
        assert f"(results/{page.name})" in readme
        commands = re.findall(r"^    odedit study (\w+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert commands and set(commands) <= set(spec.names())
