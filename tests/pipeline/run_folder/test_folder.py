"""The folder of a run: which files it may hold, which `--fresh` deletes, and when a command resumes it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from odedit import world
from odedit.errors import InputError
from pipeline.config.run import from_dict
from pipeline.driver import preflight, run
from pipeline.driver.earlier import compared_settings
from pipeline.driver.preflight import Ready, prepare, update
from pipeline.driver.run import announce
from pipeline.run_folder import sources, staging
from pipeline.study import run as study
from tests.support.mmedit_files import record, write_array


def prepared(settings: dict[str, Any], *, fresh: bool = False) -> Ready:
    return prepare(from_dict(settings), fresh=fresh)


@pytest.fixture
def finished(settings: dict[str, Any]) -> Path:
    """The folder of a finished run, with files of the user in it."""
    workspace = prepared(settings).workspace
    workspace.part(0).write_bytes(b"rows")
    workspace.edit("one").write_bytes(b"edit")
    workspace.errors.make_folder()
    (workspace.errors / "one.txt").write_text("trace")
    (workspace.results / "thesis.txt").write_text("mine")
    (workspace.out / "notes.md").write_text("mine")
    return Path(workspace.out)


@pytest.mark.parametrize(
    "mistake",
    [
        {"data": {"path": "none.json"}},
        {"data": {"image_root": "/nowhere"}},
        {"data": {"pool": "none.json"}},
        {"data": {"path": "broken.json"}},
        {"backbone": {"checkpoint": "./nowhere"}},
    ],
)
def test_fresh_deletes_nothing_if_the_settings_are_wrong(
    settings: dict[str, Any],
    finished: Path,
    mistake: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text(Path(settings["data"]["path"]).read_text()[:-50])
    before = sorted(finished.rglob("*"))
    wrong = settings | {name: settings.get(name, {}) | section for name, section in mistake.items()}
    with pytest.raises(InputError):
        prepared(wrong, fresh=True)
    assert sorted(finished.rglob("*")) == before


def test_fresh_deletes_the_runs_own_files_and_no_other(settings: dict[str, Any], finished: Path) -> None:
    changed = settings | {"seed": 1}
    prepared(changed, fresh=True)
    assert (finished / "results" / "thesis.txt").exists() and (finished / "notes.md").exists()
    assert not list(finished.rglob("part-*")) and not list(finished.rglob("one*"))
    assert json.loads((finished / "run.json").read_text())["settings"]["seed"] == 1


def test_fresh_refuses_a_folder_that_is_not_a_runs(settings: dict[str, Any]) -> None:
    out = Path(settings["out"])
    (out / "results").mkdir(parents=True)
    prepared(settings, fresh=True)  # empty folders
    shutil.rmtree(out)
    (out / "results").mkdir(parents=True)
    (out / "results" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"--fresh: .*thesis\.txt"):
        prepared(settings, fresh=True)
    assert (out / "results" / "thesis.txt").exists()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "editor: {name: wise}\n"),
        ("run.json", '{"mine": 1}'),
        ("pool.parquet", "x"),
        ("records.parquet", "x"),
    ],
)
def test_a_users_file_is_never_replaced(settings: dict[str, Any], name: str, text: str, fresh: bool) -> None:
    path = Path(settings["out"]) / name
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError, match="was not written by"):
        prepared(settings, fresh=fresh)
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [(name, text)]


def test_what_a_run_left_that_never_began_is_staged_anew(settings: dict[str, Any]) -> None:
    data = settings["data"]
    pool = Path(data["path"]).with_name("pool.json")
    write_array(pool, [record(number) for number in range(10, 13)])
    records = Path(data["path"]).read_text()
    Path(data["path"]).write_text("[]")
    with_pool = settings | {"data": data | {"pool": str(pool)}}
    for _ in range(2):
        with pytest.raises(InputError, match="holds no record"):
            prepared(with_pool)
    out = Path(settings["out"])
    assert not out.exists(), "a new folder is removed"
    out.mkdir()
    with pytest.raises(InputError, match="holds no record"):
        prepared(with_pool)
    assert not list(out.iterdir()), "an existing folder is left as it was"

    Path(data["path"]).write_text(records)
    workspace = prepared(with_pool).workspace
    workspace.run.delete()  # simulates a process that was killed before its run began
    workspace.config.delete()
    (out / ".staging-killed").mkdir()
    (out / ".staging-killed" / "records.parquet").write_text("cut off")
    write_array(pool, [record(number) for number in range(20, 23)])
    (out / "calibration.json").write_text('{"sigma2_0": 9}')
    ready = prepared(with_pool, fresh=True)
    staged_pool = staging.read_pool(ready.workspace, ready.sources)
    assert staged_pool is not None and {other.fields["src"] for other in staged_pool.records} == {
        f"What is object {number}?" for number in range(20, 23)
    }
    assert not ready.workspace.calibration.exists()


@pytest.mark.parametrize("is_begun", [False, True])
def test_what_another_process_has_written_meanwhile_stays(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, is_begun: bool
) -> None:
    """Of two equal commands at once, the one that made the folder fails."""
    out, stage = Path(settings["out"]), staging.stage

    def fail(*arguments: Any) -> None:
        with monkeypatch.context() as other:
            other.setattr(staging, "stage", stage)
            if is_begun:
                prepared(settings).workspace.part(0).write_bytes(b"rows")
            else:
                (out / "notes.md").write_text("mine")
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, "stage", fail)
    with pytest.raises(KeyboardInterrupt):
        prepared(settings)
    names = sorted(path.name for path in out.iterdir())
    if not is_begun:
        assert names == ["notes.md"]
        return
    assert names == ["attempts", "config.yaml", "edits", "records.parquet", "results", "run.json"]
    assert (out / "results" / "part-000000.parquet").read_bytes() == b"rows"


def test_a_run_that_lies_among_the_data_can_be_resumed_but_not_begun(settings: dict[str, Any]) -> None:
    out = Path(settings["data"]["image_root"]) / "runs" / "one"
    settings |= {"out": str(out)}
    with pytest.raises(InputError, match=r"lies in data\.image_root"):
        prepared(settings)
    assert not out.parent.exists()
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(sources, "check_apart", lambda data, out: None)
        prepared(settings)
    assert prepared(settings).pending


def test_secrets_are_not_stored_but_a_changed_one_is_noticed(settings: dict[str, Any], tmp_path: Path) -> None:
    config = from_dict(settings | {"data": settings["data"] | {"image_root": str(tmp_path / "coco")}})
    resolved = sources.resolve(config.data, tmp_path)
    first, second = (
        compared_settings(from_dict(settings | {"data": settings["data"] | {"rephrase_root": address}}), resolved)
        for address in ("s3://me:hunter1@bucket/x", "s3://me:hunter2@bucket/x")
    )
    assert first["data.rephrase_root"].startswith("s3://***@bucket/x [")
    assert "hunter" not in str(first) + str(second)
    assert first["data.rephrase_root"] != second["data.rephrase_root"]
    assert first["data.path"].startswith(str(tmp_path)), "a value without a secret stays as it is"


def test_a_relative_checkpoint_is_made_absolute_and_other_weights_are_another_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "small"
    shutil.copytree(world.CHECKPOINTS / "blip2", folder)
    monkeypatch.chdir(tmp_path)
    local = settings | {"backbone": {"checkpoint": "models/small"}}
    first = prepared(local)
    assert first.config.backbone.checkpoint == str(folder)
    first.workspace.part(0).write_bytes(b"")
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(InputError, match=r"backbone\.weights: was"):
        prepared(local)


def test_a_run_that_ended_without_a_result_gives_way_to_other_settings(settings: dict[str, Any]) -> None:
    """The user corrects a setting that the workers refused, and uses the same folder again."""
    first = prepared(settings | {"seed": 1})
    (first.workspace.attempts / "group-000000.json").write_text("{}")
    with pytest.raises(InputError, match="seed: was 1, now 2"):
        prepared(settings | {"seed": 2})  # the first run may still be running
    update(first.workspace, ended=True)
    assert (prepared(settings | {"seed": 1}).workspace.attempts / "group-000000.json").exists()
    corrected = prepared(settings | {"seed": 2})
    assert corrected.config.seed == 2 and not (corrected.workspace.attempts / "group-000000.json").exists()
    corrected.workspace.part(0).write_bytes(b"")
    with pytest.raises(InputError, match="seed: was 2, now 3"):
        prepared(settings | {"seed": 3})


def test_a_setting_that_is_newer_than_the_run_had_its_default(settings: dict[str, Any]) -> None:
    workspace = prepared(settings).workspace
    state = json.loads(workspace.run.read_text())
    del state["settings"]["editor.mask"], state["settings"]["pipeline.batch_size"]
    workspace.run.write_text(json.dumps(state))
    workspace.part(0).write_bytes(b"")
    with pytest.raises(InputError, match="editor.mask: was 'entries', now 'columns'"):
        prepared(settings | {"editor": settings["editor"] | {"mask": "columns"}})
    with pytest.raises(InputError, match=r"pipeline.batch_size: was 8, now"):
        prepared(settings)  # with a batch size other than the default
    update(workspace, settings=state["settings"] | {"pipeline.batch_size": settings["pipeline"]["batch_size"]})
    prepared(settings)


def test_paths_are_printed_as_they_are(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{settings['out']}[bold]"
    announce(prepare(from_dict(settings | {"out": out})), Console(stderr=True))
    assert out in capsys.readouterr().err


def test_storage_is_written_to_once_for_all_runs_below_one_address(
    settings: dict[str, Any], bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(preflight, "check_access", lambda folder, setting: tried.append(str(folder)))
    config = from_dict(settings | {"out": "s3://odedit/study/arms/a"})
    preflight.check(config)
    assert tried == ["s3://odedit/study/arms/a"], "the folders inside have the same rights"
    tried.clear()
    study._check_arms([config, replace(config, out="s3://odedit/study/arms/b")], is_drawn=False, fresh=False)
    run._prepared(config, fresh=False)
    assert tried == []
    preflight.check(from_dict(settings), is_storage_tried=True)
    assert len(tried) == 4, "folders of a machine may each have other rights"
