"""Runs of records that give a picture, a question and an answer: what supervises them is staged from pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from odedit.data.negatives import NegativePool
from odedit.errors import InputError
from pipeline.commands import show_plan
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver import preflight
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows, sources, staging
from pipeline.run_folder.workspace import Workspace
from pipeline.workers import negatives
from tests.support.mmedit_files import encoded, picture, record, write_array, write_images

COUNT = 3


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A configuration with three records that have one question for all, beside their pictures."""
    for number in range(COUNT):
        path = tmp_path / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    lines = [f"pictures/{number}.png,what is this?,dog {number}" for number in range(COUNT)]
    (tmp_path / "records.csv").write_text("\n".join(["image,question,answer", *lines]))
    return {
        "data": {"path": str(tmp_path / "records.csv")},
        "editor": {"name": "ftl", "max_steps": 2},
        "objective": {"name": "contrast"},
        "evaluation": {"generate": False, "mmedit": False},
        "tracking": {"enabled": False},
        "out": str(tmp_path / "out"),
    }


def staged(config: RunConfig) -> tuple[staging.Staged, Workspace, sources.Sources]:
    workspace = Workspace.of(config.out)
    workspace.create()
    inputs = sources.resolve(config.data, workspace.out)
    return staging.stage(config, inputs, workspace), workspace, inputs


def results(outcome: Outcome) -> list[rows.Row]:
    return list(rows.read_rows(rows.parts(outcome.workspace)))


def test_three_fields_are_edited_and_the_row_says_what_was_made(
    values: dict[str, Any], inline: Callable[[RunConfig], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[NegativePool] = []
    monkeypatch.setattr(
        negatives, "NegativePool", lambda *args: pools.append(NegativePool(*args)) or pools[-1]
    )  # fmt: skip
    done = results(inline(from_dict(values)))
    # Each picture is edited by itself: none is trained to the new answer of another.
    assert [(len(pool.features), pool.positives) for pool in pools] == [(COUNT, 0)]
    assert [(row["status"], row["error"]) for row in done] == [("edited", None)] * COUNT
    assert [row["edit_id"].rpartition("-")[0] for row in done] == [f"dog-{number}" for number in range(COUNT)]
    for row in done:
        assert row["rel"] is not None and row["t_gen"] is None and row["supervision_given"] == ""
        for name in ("text_rephrase: a built-in wording", "image_rephrase: turned ", "old_answer: asked"):
            assert name in row["supervision_made"]
        assert "negatives: the question about others of the records' pictures" in row["supervision_made"]


@pytest.mark.parametrize(("editor", "objective"), [("wise", "native"), ("ftl", "odedit"), ("wise", "contrast")])
def test_one_record_alone_is_edited(
    values: dict[str, Any], inline: Callable[[RunConfig], Outcome], editor: str, objective: str
) -> None:
    path = Path(values["data"]["path"])
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    chosen = {"editor": {"name": editor, "max_steps": 2}, "objective": {"name": objective}}
    (row,) = results(inline(from_dict(values | chosen)))
    assert (row["status"], row["error"]) == ("edited", None)


def test_the_pool_is_the_records_own_pictures_or_those_of_a_folder(values: dict[str, Any], tmp_path: Path) -> None:
    _, workspace, inputs = staged(from_dict(values))
    pool = staging.read_pool(workspace, inputs)
    assert pool is not None and pool.is_made and pool.is_own
    assert [item.fields["image"] for item in pool.records] == [f"pictures/{number}.png" for number in range(COUNT)]
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.png").write_bytes(encoded(picture(9)))
    data = values["data"] | {"pictures": str(tmp_path / "others")}
    _, workspace, inputs = staged(from_dict(values | {"data": data, "out": str(tmp_path / "other")}))
    pool = staging.read_pool(workspace, inputs)
    assert pool is not None and [item.fields["image"] for item in pool.records] == ["x.png"] and not pool.is_own
    assert pool.reader.read("x.png").pixels.shape == (18, 24, 3)
    before = inputs.identity()["data.pictures"]
    (tmp_path / "others" / "y.png").write_bytes(encoded(picture(8)))
    assert inputs.identity()["data.pictures"] != before
    with pytest.raises(InputError, match="pictures: set beside pool"):
        from_dict(values | {"data": data | {"pool": "embedded:train"}})


def test_a_run_that_reads_the_edit_alone_has_no_pool(values: dict[str, Any]) -> None:
    _, workspace, inputs = staged(from_dict(values | {"objective": {"name": "native"}}))
    assert staging.read_pool(workspace, inputs) is None
    assert staging.origins(from_dict(values | {"objective": {"name": "native"}}), workspace, inputs) == {}


def test_records_with_unrelated_questions_of_their_own_have_no_pool(settings: dict[str, Any]) -> None:
    _, workspace, inputs = staged(from_dict(settings))
    assert staging.read_pool(workspace, inputs) is None, "locality_source is 'record'"


def test_a_pool_has_roots_of_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    others = [record(number) for number in range(4)]
    image_root, rephrase_root = write_images(tmp_path / "train", others)
    data = values["data"] | {
        "pool": str(write_array(tmp_path / "train.json", others)),
        "pool_image_root": str(image_root),
        "pool_rephrase_root": str(rephrase_root),
    }
    _, workspace, inputs = staged(from_dict(values | {"data": data}))
    pool = staging.read_pool(workspace, inputs)
    assert pool is not None and not pool.is_made and pool.reader.read(others[0]["image"])
    assert inputs.reader.read("pictures/0.png")


def test_a_split_of_the_embedded_benchmark_is_a_pool(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, int]] = []
    monkeypatch.setattr(sources, "build_embedded", lambda folder, seed, *rest: built.append((str(folder), seed)))
    data = from_dict(values | {"data": values["data"] | {"pool": "embedded:train:3"}}).data
    inputs = sources.resolve(sources.with_absolute_paths(data), values["out"])
    ((folder, seed),) = built
    assert Path(folder).parent == tmp_path and seed == 3
    assert (inputs.pool, inputs.pool_image_root) == (f"{folder}/train.json", f"{folder}/images")
    assert inputs.pool_rephrase_root == f"{folder}/images_rephrase" and inputs.image_root == str(tmp_path)


def test_a_dry_run_counts_what_is_given_and_what_is_made(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_dict(values)
    ready = preflight.preview(config)
    show_plan(ready, config)
    said = capsys.readouterr().out
    for name in ("text_rephrase", "image_rephrase", "near_locality", "negatives", "old_answer"):
        assert f"# supervision: {name}: {COUNT} made\n" in said
    alone = from_dict(values | {"objective": {"name": "native"}})
    show_plan(preflight.preview(alone), alone)
    assert "# supervision: none, native with ftl reads the edit alone" in capsys.readouterr().out


def test_a_column_or_a_split_that_is_not_there_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"columns: got the key 'anwser'.*Did you mean 'answer'"):
        from_dict(values | {"data": values["data"] | {"columns": {"anwser": "label"}}})
    with pytest.raises(InputError, match="pool: Unknown embedded split 'trian'"):
        from_dict(values | {"data": values["data"] | {"pool": "embedded:trian"}})
