"""Runs that commit their records to one model, in this process: rows, the model's folder, resuming, changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

from odedit import load_edited
from odedit.data.pack import pack
from odedit.errors import InputError
from odedit.ways.common.files import load_committed
from pipeline.config.run import from_dict, load_commit
from pipeline.driver import commit as driver
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows as results
from pipeline.tracking.connection import connect
from pipeline.workers import committing, engine, scoring
from tests.support import inline_pipeline
from tests.support.mmedit_files import encoded, picture, record, write_array, write_images
from tests.support.paths import ROOT

Settings = dict[str, Any]
Commit = Callable[..., Outcome]


@pytest.fixture
def plain(settings: Settings) -> Settings:
    """Five records, trained for a few steps without a pool."""
    settings = {key: value for key, value in settings.items() if key != "editor"}
    return settings | {
        "objective": {"name": "native"},
        "commit": {"steps": 6, "copies": 1, "check_every": 2, "records": 4},
    }


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commit:
    inline_pipeline.install(monkeypatch)

    def run(settings: Settings | None = None, *overrides: str, change: Any = None, **options: Any) -> Outcome:
        from rich.console import Console

        if change is not None:
            config = driver.changed(str(change), options.pop("remove", ()), options.pop("add", None), overrides)
        else:
            path = tmp_path / "run.yaml"
            path.write_text(yaml.safe_dump(settings))
            config = load_commit(str(path), overrides)
        return driver.commit(config, Console(quiet=True), **options)

    return run


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    return list(results.read_rows(results.parts(outcome.workspace)))


def test_all_records_go_into_one_model_and_are_scored_on_it(plain: Settings, commit: Commit) -> None:
    outcome = commit(plain)
    rows = rows_of(outcome)
    assert [row["index"] for row in rows] == list(range(5))
    for row in rows:
        assert (row["status"], row["editor"], row["steps"], row["stop_reason"]) == ("edited", "lora", 6, "max_steps")
        assert row["worst_nll"] > 0 and 0 <= row["rel"] <= 1 and row["answer_after"] is not None
    summary = json.loads(outcome.workspace.summary.read_text())
    assert summary["n"] == 5
    params, info = load_committed(outcome.workspace.committed)
    assert info.way == "joint" and len(info.edit_ids) == 5 and params
    assert not outcome.workspace.training.exists() and not outcome.workspace.progress.exists()
    model = Path(outcome.workspace.model)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}
    code = (
        "import sys; sys.modules['odedit'] = None\nfrom transformers import AutoModelForImageTextToText, AutoProcessor"
    )
    code += "\nAutoModelForImageTextToText.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, cwd=ROOT.parent, capture_output=True)


def test_the_same_command_goes_on_where_it_was_killed_and_ends_with_the_same_model(
    plain: Settings, commit: Commit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = commit(plain, f"out={tmp_path / 'whole'}")
    shown: list[int] = []

    class Killed(BaseException):
        pass

    show = committing._Worker._show

    def killed(worker: Any, step: Any) -> None:
        show(worker, step)
        if step.doing == "training":
            shown.append(step.number)
            if len(shown) == 5:
                raise Killed

    monkeypatch.setattr(committing._Worker, "_show", killed)
    with pytest.raises(Killed):
        commit(plain)
    after_kill = len(shown)
    resumed = commit(plain)
    assert shown[after_kill:] == [5, 6], "training goes on after the last check"
    assert (Path(resumed.workspace.model) / "model.safetensors").read_bytes() == (
        Path(whole.workspace.model) / "model.safetensors"
    ).read_bytes()
    parts = {Path(part): Path(part).stat().st_mtime_ns for part in results.parts(resumed.workspace)}
    again = commit(plain)
    assert len(shown) == after_kill + 2, "a finished run trains nothing"
    assert {part: part.stat().st_mtime_ns for part in parts} == parts, "a finished run scores nothing"
    assert [results.to_json_row(row) for row in rows_of(again)] == [results.to_json_row(row) for row in rows_of(whole)]


def test_a_model_without_scores_is_not_replaced_by_a_command_with_other_settings(
    plain: Settings, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, records: Any, requests: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring.ScoreActor, "_process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commit(plain)
    model = Path(plain["out"]) / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns
    with pytest.raises(InputError, match=r"commit.steps: was 6, now 7(.|\n)*--fresh"):
        commit(plain, "commit.steps=7")
    assert len(rows_of(commit(plain))) == 5 and model.stat().st_mtime_ns == written, "the same command scores the model"


def test_a_finished_model_is_registered_under_a_name_that_is_given_later(
    plain: Settings, commit: Commit, tmp_path: Path
) -> None:
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    finished = commit(plain, "tracking.enabled=true", uri)
    client = connect(str(finished.tracking_uri))
    commit(plain, "tracking.enabled=true", uri, "tracking.register=digits")
    for alias in ("best", "best", "committed"):
        again = commit(plain, "tracking.enabled=true", uri, "tracking.register=digits", f"tracking.alias={alias}")
        assert again.run_id == finished.run_id
        version = client.get_model_version_by_alias("digits", alias)
        assert (str(version.version), version.run_id) == ("1", finished.run_id)
    assert client.get_run(finished.run_id).info.status == "FINISHED"
    written = (tmp_path / "mlflow.db").stat().st_mtime_ns
    commit(plain, "tracking.enabled=true", uri)
    assert (tmp_path / "mlflow.db").stat().st_mtime_ns == written, "nothing new is to be logged"


def test_contradictions_are_refused_before_any_work_and_one_of_them_can_be_kept(
    plain: Settings, commit: Commit, tmp_path: Path
) -> None:
    records = [record(0), record(1), record(0, alt="other answer", edit_id="second")]
    write_array(Path(plain["data"]["path"]), records)
    with pytest.raises(InputError, match=r"record 2 \(second\).*contradicts.*record 0"):
        commit(plain)
    assert not Path(plain["out"]).exists()
    for keep, left_out in (("first", 2), ("last", 0)):
        rows = rows_of(commit(plain, f"commit.on_conflict={keep}", f"out={tmp_path / keep}"))
        assert [row["status"] for row in rows] == ["skipped" if i == left_out else "edited" for i in range(3)]
        assert "contradicts" in rows[left_out]["error"]


def test_three_fields_and_one_question_for_all_are_committed(tmp_path: Path, commit: Commit) -> None:
    lines = ["image,question,answer"]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
        lines.append(f"{number}.png,what is this?,dog {number}")
    (tmp_path / "records.csv").write_text("\n".join(lines))
    settings = {
        "data": {"path": str(tmp_path / "records.csv")},
        "commit": {"steps": 4, "copies": 1, "check_every": 2, "records": 4},
        "evaluation": {"generate": False, "mmedit": False},
        "tracking": {"enabled": False},
        "out": str(tmp_path / "out"),
    }
    outcome = commit(settings)
    rows = rows_of(outcome)
    assert [(row["status"], row["error"]) for row in rows] == [("edited", None)] * 4
    assert all(row["rel"] is not None and "negatives" in row["supervision_made"] for row in rows)
    (tmp_path / "more.csv").write_text("\n".join([lines[0], "0.png,what colour is this?,grey"]))
    ids = [row["edit_id"] for row in rows]
    changed = commit(
        None, f"out={tmp_path / 'after'}", change=settings["out"], remove=[ids[1]], add=str(tmp_path / "more.csv")
    )
    assert [row["status"] for row in rows_of(changed)] == ["edited", "skipped", "edited", "edited", "edited"]


def test_the_sum_of_finished_edits(plain: Settings, commit: Commit, inline: Any, tmp_path: Path) -> None:
    single = {key: value for key, value in plain.items() if key != "commit"}
    editor = {"name": "ftl", "sites": ["layers.2.ffn.in"], "max_steps": 2, "learning_rate": 1e-3}
    inline(from_dict(single | {"editor": editor, "out": str(tmp_path / "edits")}))
    summed = plain | {"commit": {"way": "sum"}}
    given = commit(summed, f"out={tmp_path / 'given'}", edits_from=str(tmp_path / "edits"))
    made = commit(summed | {"editor": editor}, f"out={tmp_path / 'made'}")
    for outcome in (given, made):
        params, info = load_committed(outcome.workspace.committed)
        assert (info.editor, len(info.edit_ids), len(params["layers.2.ffn.in"])) == ("ftl", 5, 5)
    assert (Path(given.workspace.model) / "model.safetensors").read_bytes() == (
        Path(made.workspace.model) / "model.safetensors"
    ).read_bytes()
    other = [record(number, alt="something else") for number in range(5)]
    write_array(Path(plain["data"]["path"]), other)
    with pytest.raises(InputError, match=r"--from: the edit .* answers"):
        commit(summed, f"out={tmp_path / 'other'}", edits_from=str(tmp_path / "edits"))


@pytest.mark.parametrize("way", ["joint", "sum"])
def test_records_are_removed_from_and_added_to_a_model(
    plain: Settings, commit: Commit, tmp_path: Path, way: str
) -> None:
    editor = {"name": "ftl", "sites": ["layers.2.ffn.in"], "max_steps": 2, "learning_rate": 1e-3}
    section = plain["commit"] if way == "joint" else {"way": "sum"}
    before = commit(plain | {"editor": editor, "commit": section})
    ids = [row["edit_id"] for row in rows_of(before)]
    new = [record(7, edit_id="new")]
    write_images(tmp_path, new)
    added = write_array(tmp_path / "new.json", new)
    after = commit(None, f"out={tmp_path / 'after'}", change=plain["out"], remove=[ids[1]], add=str(added))
    rows = rows_of(after)
    assert [row["edit_id"] for row in rows] == [*ids, "new"]
    assert [row["status"] for row in rows] == ["edited", "skipped", "edited", "edited", "edited", "edited"]
    assert "commit.remove" in rows[1]["error"]
    params, info = load_committed(after.workspace.committed)
    assert list(info.edit_ids) == [ids[0], *ids[2:], "new"]
    if way == "sum":
        old, _ = load_committed(before.workspace.committed)
        assert (params["layers.2.ffn.in"][:4] == old["layers.2.ffn.in"][[0, 2, 3, 4]]).all()
    with pytest.raises(InputError, match=r"out: the changed model goes to a folder of its own"):
        commit(None, change=plain["out"], remove=[ids[1]])
    with pytest.raises(InputError, match=r"no usable record has the id 'nobody'"):
        commit(None, f"out={tmp_path / 'third'}", change=plain["out"], remove=["nobody"])


def test_what_does_not_fit_is_refused_in_a_sentence(plain: Settings, commit: Commit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"editor.name: got 'wise', but commit.way 'joint'"):
        commit(plain | {"editor": {"name": "wise"}})
    with pytest.raises(InputError, match=r"editor.name: got 'tpatcher', but commit.way 'sum' adds weights up"):
        commit(plain | {"editor": {"name": "tpatcher"}, "commit": {"way": "sum"}})
    with pytest.raises(InputError, match=r"--from: commit.way 'joint' trains all records together"):
        driver.check(load_commit(None), str(tmp_path))
    with pytest.raises(InputError, match=r"commit.way: Unknown way 'jont'. Did you mean 'joint'"):
        commit(plain | {"commit": {"way": "jont"}})
    with pytest.raises(InputError, match=r"--change: .* holds no committed model"):
        commit(None, change=tmp_path)
    assert not Path(plain["out"]).exists()


def test_pictures_in_a_pack_are_refused_where_they_would_be_looked_for_elsewhere(
    plain: Settings, commit: Commit, tmp_path: Path
) -> None:
    """Of an added pack they would be looked for in `data.path`, and of single edits in the file of these."""
    data = plain["data"]
    roots = {name: data.get(name) for name in ("image_root", "rephrase_root")}
    pack(data["path"], *roots.values(), str(tmp_path / "packed"))
    new = [record(7, edit_id="new")]
    write_images(tmp_path, new)
    added = str(write_array(tmp_path / "new.json", new))
    pack(added, *roots.values(), str(tmp_path / "new-packed"))
    settings = plain | {"data": {"path": str(tmp_path / "packed")} | roots}
    table = pyarrow.table({"image": [encoded(picture(7))], "question": ["what is it?"], "answer": ["a dog"]})
    parquet.write_table(table, tmp_path / "new.parquet")
    for name in ("new-packed", "new.parquet"):
        with pytest.raises(InputError, match=rf"commit.add: .*{name}, record 0: its pictures lie in the packed folder"):
            commit(plain, f"commit.add=[{tmp_path / name}]")
    editor = {"name": "ftl", "sites": ["layers.2.ffn.in"], "max_steps": 1, "learning_rate": 1e-3}
    summed = settings | {"editor": editor, "commit": {"way": "sum", "add": [added]}}
    with pytest.raises(InputError, match=r"data.path: the pictures of vqa_eval.json, record 0 lie in .*--from"):
        commit(summed)
    assert not Path(plain["out"]).exists()
    together = commit(settings | {"commit": plain["commit"] | {"add": [added]}})
    assert [row["status"] for row in rows_of(together)] == ["edited"] * 6, "no single edits are made"


def test_a_routed_model_loses_exactly_the_removed_edit_and_answers_as_it_was_scored(
    commit: Commit, worlds: dict[int, dict[str, Path]], tmp_path: Path
) -> None:
    paths = worlds[0]
    facts: dict[str, Any] = {}
    for fields in json.loads(paths["validation"].read_text()):
        facts.setdefault(fields["fact"], fields)
    write_array(tmp_path / "records.json", list(facts.values())[:3])
    data = {"path": str(tmp_path / "records.json"), "pool": str(paths["train"])}
    roots = {"image_root": str(paths["images"]), "rephrase_root": str(paths["images_rephrase"])}
    before = commit(
        {
            "data": data | roots,
            "commit": {"way": "routed", "steps": 20},
            "tracking": {"enabled": False},
            "out": str(tmp_path / "before"),
        }
    )
    rows = rows_of(before)
    assert [row["status"] for row in rows] == ["edited"] * 3
    old, info = load_committed(before.workspace.committed)
    after = commit(None, f"out={tmp_path / 'after'}", change=before.workspace.out, remove=[info.edit_ids[1]])
    new, changed = load_committed(after.workspace.committed)
    assert changed.edit_ids == (info.edit_ids[0], info.edit_ids[2])
    for name, value in old.items():
        has_row = len(value) == 3 and len(new[name]) == 2
        assert torch.equal(new[name], value[[0, 2]] if has_row else value), name
    listed = json.loads((Path(before.workspace.model) / "edits.json").read_text())["edits"]
    model = load_edited(Path(before.workspace.model))

    def asked(model: Any, entry: dict[str, Any]) -> str:
        return model.answer(paths["images"] / entry["image"], entry["prompt"], is_caption=entry["task"] == "caption")

    assert [asked(model, entry) for entry in listed] == [row["answer_after"] for row in rows]
    assert asked(load_edited(Path(after.workspace.model)), listed[1]) == rows[1]["answer_before"]

    options = {"change": after.workspace.out, "edits_from": str(tmp_path / "before" / "single")}
    again = commit(None, f"out={tmp_path / 'again'}", "commit.remove=[]", **options)
    back, returned = load_committed(again.workspace.committed)
    assert returned.edit_ids == info.edit_ids
    for name, value in old.items():
        # Keys are computed alone here, in a batch before.
        torch.testing.assert_close(back[name], value, atol=1e-5 if name.startswith("router") else 0, rtol=0)


def test_a_bulk_model_answers_without_odedit_and_loses_a_record_as_if_it_never_had_it(
    commit: Commit, worlds: dict[int, dict[str, Path]], tmp_path: Path
) -> None:
    paths = worlds[0]
    facts: dict[str, Any] = {}
    for fields in json.loads(paths["validation"].read_text()):
        if fields["task"] == "vqa":
            facts.setdefault(fields["fact"], fields)
    chosen = list(facts.values())[:3]
    write_array(tmp_path / "records.json", chosen)
    write_array(tmp_path / "pool.json", json.loads(paths["train"].read_text())[:240:10])
    settings = {
        "data": {
            "path": str(tmp_path / "records.json"),
            "pool": str(tmp_path / "pool.json"),
            "image_root": str(paths["images"]),
            "rephrase_root": str(paths["images_rephrase"]),
        },
        "supervision": {"rephrases": 1},
        "commit": {"way": "bulk", "copies": 2, "pool_copies": 0, "candidates": 16},
        "pipeline": {"batch_size": 4},
        "tracking": {"enabled": False},
        "out": str(tmp_path / "before"),
    }
    before = commit(settings)
    rows = rows_of(before)
    assert [(row["status"], row["stop_reason"], row["editor"]) for row in rows] == [
        ("edited", "written", "residual")
    ] * 3
    assert [row["answer_after"] for row in rows] == [fields["alt"] for fields in chosen]
    questions = [[fields["src"], str(paths["images"] / fields["image"])] for fields in chosen]
    asked = [{"family": "blip2", "checkpoint": str(before.workspace.model), "questions": questions}]
    program = [sys.executable, "-m", "tests.support.plain_answers"]
    done = subprocess.run(program, input=json.dumps(asked), capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == [[row["answer_after"] for row in rows]]

    old, info = load_committed(before.workspace.committed)
    after = commit(None, f"out={tmp_path / 'after'}", change=before.workspace.out, remove=[info.edit_ids[1]])
    assert not (tmp_path / "after" / "moments").exists(), "those of the earlier run are read"
    assert [row["answer_after"] for row in rows_of(after)] == [rows[0]["answer_after"], None, rows[2]["answer_after"]]
    never = commit(
        settings, f"out={tmp_path / 'never'}", f"commit.remove=[{info.edit_ids[1]}]",
        edits_from=str(tmp_path / "before" / "single"),
    )  # fmt: skip
    without, expected = (load_committed(run.workspace.committed)[0] for run in (after, never))
    for name, value in expected.items():
        # Pictures are encoded in other groups, so features differ in their last bits.
        torch.testing.assert_close(without[name], value, rtol=1e-3, atol=1e-5)
    store = f"pipeline.feature_store={tmp_path / 'store'}"
    again = commit(None, f"out={tmp_path / 'again'}", "commit.remove=[]", change=after.workspace.out)
    back, returned = load_committed(again.workspace.committed)
    assert returned.edit_ids == info.edit_ids
    for name, value in old.items():
        # Its vector is made alone here, in a batch before.
        assert float((back[name] - value).norm()) < 0.1 * float(value.norm()), name
    fourth = commit(settings, f"out={tmp_path / 'fourth'}", store, edits_from=str(tmp_path / "before" / "single"))
    kept = tmp_path / "store" / "moments"
    assert list(kept.glob("*/share-*")) and not (Path(fourth.workspace.out) / "moments").exists()
    assert [row["answer_after"] for row in rows_of(fourth)] == [row["answer_after"] for row in rows]


def test_folders_of_others_are_not_replaced(plain: Settings, commit: Commit) -> None:
    model = Path(plain["out"]) / "model"
    model.mkdir(parents=True)
    (model / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"model exists, and was not written by `odedit commit`"):
        commit(plain)
    assert (model / "mine.txt").read_text() == "mine"


def test_a_changed_model_keeps_way_and_editor_and_other_edits_are_another_run(
    plain: Settings, commit: Commit, inline: Any, tmp_path: Path
) -> None:
    editor = {"name": "ftl", "sites": ["layers.2.ffn.in"], "max_steps": 1, "learning_rate": 1e-3}
    single = {key: value for key, value in plain.items() if key != "commit"} | {"editor": editor}
    for name in ("one", "two"):
        inline(from_dict(single | {"out": str(tmp_path / name)}))
    summed = plain | {"editor": editor, "commit": {"way": "sum"}}
    commit(summed, edits_from=str(tmp_path / "one"))
    with pytest.raises(InputError, match=r"--from: was .*one.*now .*two"):
        commit(summed, edits_from=str(tmp_path / "two"))
    for setting, message in (
        ("editor.learning_rate=0.1", r"editor.learning_rate: got 0.1, but the model .* was made with 0.001"),
        ("commit.way=joint", r"commit.way: got 'joint', but the model .* was made with 'sum'"),
    ):
        with pytest.raises(InputError, match=message):
            commit(None, setting, f"out={tmp_path / 'other'}", change=plain["out"])


def test_added_records_of_a_sum_get_their_edits_and_more_workers_than_records_are_not_started(
    plain: Settings, commit: Commit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    editor = {"name": "ftl", "sites": ["layers.2.ffn.in"], "max_steps": 1, "learning_rate": 1e-3}
    new = [record(7, edit_id="new")]
    write_images(tmp_path, new)
    added = str(write_array(tmp_path / "new.json", new))
    extended = plain | {"editor": editor, "commit": {"way": "sum", "add": [added]}}
    outcome = commit(extended)
    assert [row["status"] for row in rows_of(outcome)] == ["edited"] * 6
    shutil.rmtree(Path(outcome.workspace.model))
    commit(extended)  # goes on with the run of single edits of the first command
    assert (Path(outcome.workspace.model) / "model.safetensors").exists()

    asked: list[int] = []
    train = engine.train

    def counted(commit_job: Any, plan: Any, num_workers: int, show: Any) -> None:
        asked.append(num_workers)
        train(commit_job, plan, num_workers, show)

    monkeypatch.setattr(engine, "train", counted)
    commit(plain, "pipeline.actors=9", f"out={tmp_path / 'nine'}")
    assert asked == [5]
