"""Failures without an edit's fault, such as a full disk, a lost GPU or an interrupt, make no failed row."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outside_editors.poisoned import WorkerDeath
from ray import cloudpickle
from safetensors import SafetensorError

from odedit.data.images import ImageReader
from odedit.errors import InputError
from odedit.storage.location import Location
from pipeline.config.run import BackboneConfig, from_dict
from pipeline.driver import run as runner
from pipeline.driver.preflight import prepare
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows
from pipeline.workers import device_errors, graph, output, ray_session
from pipeline.workers import editor as actor
from pipeline.workers.model import load_with_feature_cache, with_checked_store
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Prepared, Preparer, write_traceback
from tests.support.mmedit_files import record, write_array

Inline = Callable[..., Outcome]


def poisoned(settings: dict[str, Any], ids: list[str]) -> dict[str, Any]:
    write_array(Path(settings["data"]["path"]), [record(number, edit_id=name) for number, name in enumerate(ids)])
    editor = {"name": "outside_editors.poisoned", "sites": ["layers.2.ffn.in"], "max_steps": 1}
    return settings | {"editor": editor, "objective": {"name": "native"}, "pipeline": {"batch_size": 8}}


def statuses(outcome: Outcome) -> list[str]:
    return [row["status"] for row in rows.read_rows(rows.parts(outcome.workspace))]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_an_edit_that_cannot_be_saved_ends_the_run_and_is_repeated(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = from_dict(poisoned(settings, ["good-1", "good-2"]))

    def full(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(output, "save_edit", full)
        for _ in range(4):  # more often than an edit may kill its worker
            with pytest.raises(graph.GraphError, match="(?i)results cannot be written.*no space"):
                inline(config)
    out = Path(config.out)
    assert not list(out.glob("results/*")) and not list(out.glob("attempts/*"))
    assert statuses(inline(config)) == ["edited", "edited"]


@pytest.mark.parametrize("expected", [graph.GraphError, InputError])
def test_a_fatal_error_is_one_sentence_and_no_further_group_is_edited(expected: type[Exception]) -> None:
    tried = []

    class Failing:
        def __init__(self, job: object) -> None:
            pass

        def __call__(self, prepared: Prepared) -> None:
            tried.append(prepared.group)
            raise OSError(28, "No space left") if expected is graph.GraphError else InputError("No space left")

    class Stage(graph.EditStage):
        def _worker_class(self, job: object) -> type:
            return Failing

    job: Any = SimpleNamespace(config=SimpleNamespace(backbone=None), profile=False)
    stage = Stage([job])
    for group in range(3):  # in one block
        batch = {"job": [0], "prepared": [cloudpickle.dumps(Prepared(group, (), (), ()))], "seconds": ["{}"]}
        report = {name: values[0] for name, values in stage(batch).items()}
        with pytest.raises(expected, match="No space left"):
            graph.raise_fatal(report, [None])
    assert tried == [0]


def test_an_unexpected_exception_is_a_sentence_and_its_traceback_a_file(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised through Ray it would arrive as a page: `RayTaskError(UserCodeException): ray::MapWorker...`."""
    ready = prepare(from_dict(settings))
    job = Job(ready.config, ready.sources, ready.workspace)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("mat1 and mat2\ncannot be multiplied")

    for owner, name in ((actor.EditActor, "_objective"), (Preparer, "__call__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            prepared = graph.PrepareStage([job])({"job": [0], "group": [0]})
            report = {name: values[0] for name, values in graph.EditStage([job])(prepared).items()}
        expected = r"^RuntimeError: mat1 and mat2 cannot be multiplied \(traceback: .*/errors/group-000000\.txt\)$"
        with pytest.raises(graph.GraphError, match=expected):
            graph.raise_fatal(report, [job])
        assert "Traceback" in (ready.workspace.errors / "group-000000.txt").read_text()
        (ready.workspace.errors / "group-000000.txt").delete()


def test_a_full_disk_does_not_hide_why_a_run_ended(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`run.json` cannot be written: the first error is still raised, and the MLflow run closed."""
    closed: list[tuple[str, str]] = []

    def full(*arguments: Any, **values: Any) -> None:
        raise OSError(28, "No space left")

    ready = prepare(from_dict(settings))
    with pytest.raises(graph.GraphError, match="the first"), runner._OpenRun(ready, None) as opened_run:
        tracker = SimpleNamespace(finish=lambda status, error: closed.append((status, str(error))))
        opened_run._tracker = tracker  # type: ignore[assignment]
        monkeypatch.setattr(runner, "update", full)
        raise graph.GraphError("the first")
    assert closed == [("FAILED", "the first")]


def test_settings_that_do_not_fit_the_model_are_the_users_error(settings: dict[str, Any]) -> None:
    wrong = from_dict(settings | {"editor": settings["editor"] | {"site": "layers.99.ffn.in"}})
    with pytest.raises(InputError, match=r"layers\.99\.ffn\.in"):
        prepare(wrong)
    # A worker may load another model than the one that `prepare` checked.
    ready = prepare(from_dict(settings))
    job = Job(wrong, ready.sources, ready.workspace)
    prepared = graph.PrepareStage([job])({"job": [0], "group": [0]})
    report = {name: values[0] for name, values in graph.EditStage([job])(prepared).items()}
    with pytest.raises(InputError, match=r"layers\.99\.ffn\.in"):
        graph.raise_fatal(report, [job])
    with pytest.raises(InputError, match=r"^out: .*layers\.99"):  # the message names the run if there are several
        graph.raise_fatal(report, [job, job])


def test_a_lost_gpu_ends_the_worker_and_fails_only_the_edit_that_caused_it(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise WorkerDeath

    monkeypatch.setattr(device_errors.os, "_exit", end)
    with pytest.raises(WorkerDeath):  # in a worker, which Ray starts again
        device_errors.end_if_device_is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    config = from_dict(poisoned(settings, ["good-1", "cuda-1", "good-2"]))
    for _ in range(3):
        with pytest.raises(graph.GraphError, match="the GPU cannot be used any more .*same command goes on"):
            inline(config)
    outcome = inline(config)
    assert statuses(outcome) == ["edited", "failed", "edited"]


def test_an_interrupt_is_no_attempt(settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_dict(poisoned(settings, ["good-1", "good-2"]))

    def interrupted(*arguments: Any) -> None:
        assert json.loads((Path(config.out) / "attempts" / "group-000000.json").read_text())["whole"] == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(actor, "edit", interrupted)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                inline(config)
            assert not list((Path(config.out) / "attempts").iterdir())
    assert statuses(inline(config)) == ["edited", "edited"]


def test_a_traceback_that_cannot_be_written_raises_nothing(settings: dict[str, Any]) -> None:
    ready = prepare(from_dict(settings))
    ready.workspace.errors.write_text("a file where the folder should be")
    write_traceback(Job(ready.config, ready.sources, ready.workspace), "name")


def test_storage_that_cannot_be_read_ends_the_run_and_skips_no_record(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict(settings)
    ready = prepare(config)
    tried: list[str] = []

    def refused(reader: ImageReader, path: str, *arguments: Any) -> bytes:
        tried.append(path)
        raise OSError("When reading information for key: AWS Error SERVICE_UNAVAILABLE during HeadObject operation")

    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "_file_bytes", refused)
        patch.setattr(ImageReader, "_is_local", lambda *_: False)
        job = Job(ready.config, ready.sources, ready.workspace)
        prepared = graph.PrepareStage([job])({"job": [0], "group": [0]})
        report = {name: values[0] for name, values in graph.EditStage([job])(prepared).items()}
        with pytest.raises(graph.GraphError, match=r"cannot be read \(.*The same command goes on from there"):
            graph.raise_fatal(report, [job])
        assert len(tried) == 1, "no further picture is read"
        with pytest.raises(graph.GraphError, match="The same command goes on from there"):
            inline(config)
    assert not ready.workspace.results.names()
    assert statuses(inline(config)) == ["edited"] * 5


def test_a_feature_store_that_refuses_when_a_worker_starts_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(location: Location) -> bool:
        raise OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.")

    monkeypatch.setattr(Location, "is_file", refused)
    warnings: list[str] = []
    load_with_feature_cache(BackboneConfig(), "cpu", str(tmp_path / "store"), warnings.append)
    with pytest.raises(InputError, match="cannot look at"):
        with_checked_store(from_dict({"pipeline": {"feature_store": str(tmp_path / "store")}}))


def test_ray_is_ended_after_the_threads_that_read_ahead() -> None:
    """A thread that calls Ray after its end would exit the process before it reports why the run failed."""
    reading = threading.Event()
    ahead = threading.Thread(target=reading.wait, args=(20,), name="iter_threaded")
    ahead.start()
    threading.Timer(0.3, reading.set).start()
    alive: list[bool] = []
    ray_session._stop(SimpleNamespace(shutdown=lambda: alive.append(ahead.is_alive())))
    assert alive == [False]
