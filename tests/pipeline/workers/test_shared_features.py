"""Runs and trainings that share a feature store compute a picture once, with the results of those without a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from odedit.backbones.common.qformer import QFormerBackbone
from odedit.errors import InputError
from pipeline.config.run import from_dict
from pipeline.driver.preflight import prepare
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows as results
from pipeline.training import train
from pipeline.workers import calibration, model
from tests.support.mmedit_files import record, write_array, write_images

Inline = Callable[..., Outcome]
NUM_PICTURES = 20
"""Pictures of five records: edit, locality, and one rephrase each for supervision and scoring."""


@pytest.fixture
def towered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of pictures in each call of the image tower, without calls on a model without weights."""
    calls: list[int] = []
    original = QFormerBackbone.tower

    def tower(self: QFormerBackbone, pixels: torch.Tensor) -> torch.Tensor:
        if not pixels.is_meta:
            calls.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(QFormerBackbone, "tower", tower)
    return calls


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Clears the caches of the worker before the test; the returned function clears them again."""
    monkeypatch.setattr(model, "_loaded", {})
    monkeypatch.setattr(calibration, "_measured", {})

    def forget() -> None:
        model._loaded.clear()
        calibration._measured.clear()

    return forget


def variant(settings: dict[str, Any], name: str, store: object) -> Any:
    pipeline = settings["pipeline"] | {"feature_store": None if store is None else str(store)}
    return from_dict(settings | {"out": f"{settings['out']}-{name}", "pipeline": pipeline})


def outcome_of(outcome: Outcome) -> tuple[list[dict[str, Any]], dict[str, dict[str, torch.Tensor]]]:
    rows = [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in results.read_rows(results.parts(outcome.workspace))
    ]
    return rows, {path.name: load_file(path) for path in outcome.workspace.edits.glob()}


def same(first: Outcome, second: Outcome) -> bool:
    (rows, edits), (other_rows, other_edits) = outcome_of(first), outcome_of(second)
    return (
        len(rows) == 5
        and rows == other_rows
        and {name: list(edit) for name, edit in edits.items()}
        == {name: list(edit) for name, edit in other_edits.items()}
        and all(
            torch.equal(value, other_edits[name][key]) for name, edit in edits.items() for key, value in edit.items()
        )
    )


def test_a_second_run_computes_no_picture_and_has_the_same_results(
    settings: dict[str, Any], inline: Inline, towered: list[int], worker: Callable[[], None], tmp_path: Path
) -> None:
    first = inline(variant(settings, "first", tmp_path / "store"))
    assert sum(towered) == NUM_PICTURES, "measuring the bandwidth uses the store, as the edits do"
    worker()
    towered.clear()
    second = inline(variant(settings, "second", tmp_path / "store"))
    assert not towered
    worker()
    without = inline(variant(settings, "without", None))
    assert sum(towered) == NUM_PICTURES, "without a store, a worker caches its pictures in memory"
    assert same(first, second) and same(second, without)


def test_the_next_run_of_a_worker_computes_no_picture_again(
    settings: dict[str, Any], inline: Inline, towered: list[int]
) -> None:
    first = inline(variant(settings, "first", None))
    towered.clear()
    assert same(first, inline(variant(settings, "second", None)))
    assert not towered


def test_a_store_that_breaks_between_runs_loses_no_edit(
    settings: dict[str, Any], inline: Inline, towered: list[int], worker: Callable[[], None], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = inline(variant(settings, "first", store))
    assert not (first.workspace.errors / "feature-store.txt").exists()
    (folder,) = store.iterdir()
    folder.rename(tmp_path / "aside")
    folder.write_text("in the way")
    worker()
    second = inline(variant(settings, "second", store))
    assert same(first, second) and sum(towered) == 2 * NUM_PICTURES
    assert str(store) in (second.workspace.errors / "feature-store.txt").read_text()


def test_training_takes_features_from_the_store(settings: dict[str, Any], towered: list[int], tmp_path: Path) -> None:
    others = [record(number) for number in range(10, 13)]
    write_images(tmp_path, others)
    editor = {
        "name": "mend", "sites": ["layers.-1.ffn.in"], "rank": 4, "batch_size": 2, "training_steps": 2,
        "validate_every": 2,
    }  # fmt: skip
    section = {"path": settings["data"]["path"], "validation": str(write_array(tmp_path / "val.json", others))}
    config = variant(settings | {"editor": editor, "training": section}, "train", tmp_path / "store")
    weights = []
    for name, expected in (("a", 1), ("b", 0)):
        towered.clear()
        out = train.run(config, tmp_path / f"{name}.safetensors", Console(quiet=True), fresh=False)
        assert bool(towered) == bool(expected)
        weights.append(load_file(out))
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


@pytest.mark.parametrize(("text", "expected"), [("{file}", "lies under a file"), ("gopher://x/y", "cannot use")])
def test_a_path_that_cannot_be_a_store_is_refused_before_anything_starts(
    settings: dict[str, Any], tmp_path: Path, text: str, expected: str
) -> None:
    config = variant(settings, "run", text.format(file=settings["data"]["path"]))
    with pytest.raises(InputError, match=f"pipeline.feature_store: .*{expected}"):
        prepare(config)
    assert not Path(config.out).exists()
    config = replace(config, editor=from_dict({"editor": {"name": "mend"}}).editor)
    with pytest.raises(InputError, match=f"pipeline.feature_store: .*{expected}"):
        train.run(config, tmp_path / "x" / "w.safetensors", Console(quiet=True), fresh=False)


def test_workers_elsewhere_find_a_store_by_its_full_path(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ready = prepare(variant(settings, "run", "features"))
    assert ready.config.pipeline.feature_store == str(tmp_path / "features")
    assert not (tmp_path / "features").exists(), "checking creates no folder"
    # Results do not depend on the store, so a run without it continues the same run.
    prepare(variant(settings, "run", None))
