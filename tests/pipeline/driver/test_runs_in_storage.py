"""Runs whose `out` is in an object store: resumed after a kill, read by other commands, refused by the store."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from odedit import InputError, world
from odedit.__main__ import app
from odedit.storage.tensors import read_tensors
from pipeline.config import strict
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.preflight import prepare
from pipeline.driver.run import Outcome, run
from pipeline.run_folder import rows
from pipeline.run_folder.workspace import Workspace
from pipeline.study import run as study_runner
from pipeline.study.spec import StudyConfig
from pipeline.training import train
from pipeline.workers.stages import GraphError
from tests.support import inline_pipeline
from tests.support.object_store import ObjectStore
from tests.support.paths import ROOT
from tests.support.rows import assert_same

Inline = Callable[[RunConfig], Outcome]

OUT = "s3://odedit/runs/one"
QUIET = Console(quiet=True)
PATIENCE_S = 240.0
MEND = {
    "name": "mend", "sites": ["layers.-1.ffn.in"], "rank": 4, "edit_rate": 0.01, "learning_rate": 1e-4,
    "batch_size": 2, "accumulate": 1, "training_steps": 4, "validate_every": 2,
}  # fmt: skip


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows_of(out: str) -> list[dict[str, Any]]:
    return list(rows.read_rows(rows.parts(Workspace.of(out))))


def edited(requests: list[str]) -> list[str]:
    """Ids of the edits that were written."""
    written = [request for request in requests if request.startswith("PUT ") and request.endswith(".safetensors")]
    return [Path(request).stem for request in written]


@pytest.mark.ray
def test_a_killed_run_resumes_with_exactly_the_missing_records(
    settings: dict[str, Any], bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inline_pipeline.install(monkeypatch)  # not in the subprocess below, which has real workers
    expected = rows_of(str(run(from_dict(settings), QUIET).workspace.out))
    file = tmp_path / "run.yaml"
    settings["pipeline"]["actors"] = 1
    file.write_text(yaml.safe_dump(settings | {"out": OUT}))
    command = [sys.executable, "-m", "odedit", "edit", "--config", str(file)]
    is_edited = threading.Event()

    def answer(method: str, path: str) -> int | None:
        # Batches are prepared in parallel, so any of them may be first.
        if method == "PUT" and "/results/part-" in path and bucket.names("runs/one/results/"):
            is_edited.set()
            return 503
        return None

    bucket.answer = answer
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert is_edited.wait(PATIENCE_S)
    family = psutil.Process(first.pid).children(recursive=True)
    for process in [psutil.Process(first.pid), *family]:
        process.kill()
    first.wait(30)
    assert not psutil.wait_procs(family, timeout=30)[1]
    bucket.answer = lambda method, path: None
    (kept,) = bucket.names("runs/one/results/")
    done = {row["edit_id"] for row in rows_of(OUT)}
    (attempt,) = bucket.names("runs/one/attempts/")
    assert Path(attempt).stem.split("-")[1] != Path(kept).stem.split("-")[1]

    before = len(bucket.requests)
    again = odedit("edit", "--config", file)
    assert again.exit_code == 0, (again.output, again.exception)
    assert f"Resuming {OUT}: {len(done)} of 5 usable records done." in again.stderr
    requests = bucket.requests[before:]
    assert sorted(edited(requests)) == sorted({row["edit_id"] for row in expected} - done)
    assert f"PUT /odedit/{kept}" not in requests
    assert_same(rows_of(OUT), expected)
    names = {name.removeprefix("runs/one/").split("/")[0] for name in bucket.names("runs/one/")}
    assert names == {"config.yaml", "records.parquet", "calibration.json", "edits", "results", "run.json",
                     "summary.json", "report.html"}  # fmt: skip


def test_other_commands_read_a_run_in_the_store(
    settings: dict[str, Any], bucket: ObjectStore, inline: Inline, tmp_path: Path
) -> None:
    store = {"enabled": True, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    there = inline(from_dict(settings | {"out": OUT, "tracking": store}))
    here = inline(from_dict(settings | {"seed": 1}))
    assert there.summary["n"] == 5
    edit = there.workspace.edits.glob("*.safetensors")[0]
    asked = odedit("apply", edit, "--prompt", "What is object 0?")
    assert asked.exit_code == 0, (asked.output, asked.exception)

    pages = (f"{OUT}/page.html", tmp_path / "page.html")
    compared = [odedit("compare", OUT, here.workspace.out, "--html", page) for page in pages]
    assert compared[0].exit_code == 0, (compared[0].output, compared[0].exception)
    assert "# one against out" in compared[0].stdout and "| seed | 0 | 1 |" in compared[0].stdout
    assert (there.workspace.out / "page.html").read_text() == pages[1].read_text()

    known = odedit("mlflow", "sync", OUT)
    assert f"{OUT} is logged already" in known.stdout, known.output
    other = odedit("mlflow", "sync", OUT, "--uri", f"sqlite:///{tmp_path / 'other.db'}")
    assert f"{OUT} is logged, as run" in other.stdout, other.output
    run_id = other.stdout.split()[-1].rstrip(".")
    twice = odedit("compare", OUT, run_id, "--uri", f"sqlite:///{tmp_path / 'other.db'}")
    assert twice.exit_code == 0 and "+0.000" in twice.stdout, (twice.output, twice.exception)

    with pytest.raises(InputError, match=f"out: {OUT} holds a run with other settings"):
        prepare(from_dict(settings | {"out": OUT, "seed": 2}))
    prepare(from_dict(settings | {"out": OUT, "seed": 2}), fresh=True)
    assert {name.split("/")[2] for name in bucket.names("runs/one/")} == {
        "config.yaml", "records.parquet", "run.json", "page.html",
    }  # fmt: skip


def test_features_and_embedded_records_are_written_to_the_store(
    settings: dict[str, Any],
    bucket: ObjectStore,
    inline: Inline,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def build(folder: str, seed: int, rephrases: int) -> None:
        """A benchmark of five records; drawing the real one takes ten seconds."""
        for name, source in (("images", "coco"), ("images_rephrase", "rephrased")):
            shutil.copytree(tmp_path / source, Path(folder) / name)
        for split in ("train", "validation", "evaluation"):
            shutil.copy(tmp_path / "vqa_eval.json", Path(folder) / f"{split}.json")

    monkeypatch.setattr(world, "build", build)
    settings["pipeline"] |= {"feature_store": "s3://odedit/features"}
    changes = {"data": {"path": "embedded:evaluation", "limit": 2}, "editor": settings["editor"] | {"max_steps": 1}}
    first = inline(from_dict(settings | changes | {"out": OUT}))
    assert first.summary["n"] == 2 and first.workspace.errors.names() == []
    stored = bucket.names("features/")
    assert stored and any(name.startswith("runs/world-") for name in bucket.names("runs/"))
    before = len(bucket.requests)
    second = inline(from_dict(settings | changes | {"out": "s3://odedit/runs/two"}))
    assert bucket.names("features/") == stored and second.workspace.errors.names() == []
    written = [request for request in bucket.requests[before:] if request.startswith("PUT ")]
    assert not [request for request in written if "/features/" in request or "/world-" in request]
    assert_same(rows_of("s3://odedit/runs/two"), rows_of(OUT))


def test_a_permanent_refusal_of_the_store_is_a_sentence_and_no_attempt(
    settings: dict[str, Any], bucket: ObjectStore, inline: Inline
) -> None:
    config = from_dict(settings | {"out": OUT})
    full = [0]

    def answer(method: str, path: str) -> int | None:
        full[0] += method == "PUT" and "/edits/" in path
        return 507 if method == "PUT" and "/edits/" in path else None

    bucket.answer = answer
    with pytest.raises(GraphError, match="HTTP status 507"):
        inline(config)
    assert full == [1] and bucket.names("runs/one/attempts/") == bucket.names("runs/one/results/") == []
    bucket.answer = lambda method, path: None
    assert inline(config).summary["n"] == 5

    before = bucket.names()
    bucket.answer = lambda method, path: 403 if method == "PUT" else None
    for out, expected in (
        ("s3://odedit/new", r"^out: s3://odedit/new cannot be written to \(.*ACCESS_DENIED.*\)\. Check the name"),
        ("s3://nowhere/new", r"^out: s3://nowhere/new cannot be written to \("),
    ):
        with pytest.raises(InputError, match=expected):
            prepare(replace(config, out=out))
    bucket.answer = lambda method, path: None
    with pytest.raises(InputError, match=r"^out: s3://nowhere/new cannot be written to \(.*NO_SUCH_BUCKET"):
        prepare(replace(config, out="s3://nowhere/new"))
    assert bucket.names() == before


def test_a_tracking_uri_is_required_if_out_is_an_address(settings: dict[str, Any], bucket: ObjectStore) -> None:
    with pytest.raises(InputError, match=r"^tracking.uri: has to be given where results go to an address"):
        prepare(from_dict(settings | {"out": OUT, "tracking": {}}))
    assert bucket.requests[1:] == []


def test_a_training_is_resumed_in_the_store(
    settings: dict[str, Any], bucket: ObjectStore, inline: Inline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section = {"path": settings["data"]["path"], "validation": settings["data"]["path"]}
    config = from_dict(settings | {"editor": MEND, "training": section, "objective": {"name": "native"}})
    whole = train.run(config, tmp_path / "whole.safetensors", QUIET, fresh=False)
    original = train._Bar.__call__

    def interrupt(self: Any, name: str, done: int, total: int | None, figures: Any) -> None:
        original(self, name, done, total, figures)
        if self._unit == "step" and done == 3:
            raise KeyboardInterrupt

    out = "s3://odedit/weights/mend.safetensors"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train._Bar, "__call__", interrupt)
        train.run(config, out, QUIET, fresh=False)
    assert bucket.names("weights/") == ["weights/mend.training.safetensors"]
    weights = train.run(config, out, QUIET, fresh=False)
    resumed, _ = read_tensors(weights)
    assert all(torch.equal(resumed[name], value) for name, value in read_tensors(whole)[0].items())

    outcome = inline(from_dict(settings | {"editor": MEND | {"checkpoint": out}, "out": OUT}))
    assert outcome.summary["n"] == 5 and not outcome.summary["failed"]


def test_a_study_goes_to_the_store(
    settings: dict[str, Any], bucket: ObjectStore, inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {name: settings[name] for name in ("supervision", "editor", "pipeline", "tracking")}
    none = {"generality_weight": 0.0}
    study = strict.build(
        StudyConfig,
        {
            "title": "Small",
            "draw": None,
            "settings": shared | {"data": settings["data"] | {"limit": 2}, "evaluation": {"generate": False}},
            "axes": {"objective": {"native": {"objective": {"name": "native"}}, "none": {"objective": none}}},
            "baseline": {"objective": "native"},
            "plot": {"kind": "dots", "y": "objective"},
        },
    )  # fmt: skip
    out = "s3://odedit/studies/small"
    finished = study_runner.run("small", study, out, QUIET)
    assert [cell.n for cell in finished.cells] == [2, 2]
    assert {"plot.png", "study.json", "table.csv", "table.md"} <= set(Workspace.of(out).out.names())
    before = len(bucket.requests)
    again = study_runner.run("small", study, out, QUIET)
    assert again.markdown == finished.markdown and not edited(bucket.requests[before:])
    compared = odedit("compare", out)
    assert compared.exit_code == 0, (compared.output, compared.exception)
