"""`odedit score`: one model scored on the records of a configuration, in this process, without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pyarrow import parquet
from typer.testing import CliRunner, Result

from odedit import load_backbone, world
from odedit.__main__ import app
from odedit.backbones.common.generation import until_end
from odedit.data.images import ImageReader
from odedit.data.pool import Pool
from odedit.data.records import read_records
from odedit.editing.files import load_edits
from odedit.editing.merging import export
from odedit.evaluation.edited import Edited
from odedit.evaluation.scores import decoded
from odedit.inputs.batch import Probe
from odedit.inputs.prompts import find_template
from odedit.ways.base import Fit, PlainWay, WayConfig
from odedit.ways.common import files as committed_files
from odedit.ways.common.files import CommittedInfo, save_committed
from pipeline.config.run import from_dict, load
from pipeline.driver.earlier import is_commit
from pipeline.driver.preflight import prepare
from pipeline.driver.run import score_into
from pipeline.driver.tracked import command
from pipeline.edits.answers import Questions
from pipeline.run_folder import rows as results
from pipeline.run_folder.contradictions import find
from pipeline.run_folder.workspace import Workspace, read_json
from pipeline.score import without_method
from pipeline.workers import kept
from pipeline.workers import scoring as actor
from pipeline.workers.compared import Compared
from pipeline.workers.plan import ScoredModel
from tests.pipeline.conftest import QUIET
from tests.support import inline_pipeline, tiny_models
from tests.support.mmedit_files import record, write_array, write_images
from tests.support.rows import assert_same

CHECKPOINT = world.CHECKPOINTS / "blip2"
Settings = dict[str, Any]
NOT_SCORES = {
    "steps", "stop_reason", "seconds", "worst_nll", "lambda", "penalty_steps", "losses", "rephrase_distance", "model",
    "editor", "objective", "supervision", "supervision_given", "supervision_made",
}  # fmt: skip


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path, Path]:
    """Settings of five records with a pool, a finished run of FT-L, and a checkpoint with the first edit in it."""
    folder = tmp_path_factory.mktemp("edited")
    records = [record(number, fact=f"kind of {number}") for number in range(5)]
    others = [record(number) for number in range(5, 12)]
    image_root, rephrase_root = write_images(folder, [*records, *others])
    data = {"path": str(write_array(folder / "vqa_eval.json", records)), "image_root": str(image_root)}
    data |= {"rephrase_root": str(rephrase_root), "pool": str(write_array(folder / "pool.json", others))}
    settings = {"data": data, "tracking": {"enabled": False}, "pipeline": {"batch_size": 2}}
    editor = {"name": "ftl", "learning_rate": 0.003, "max_steps": 12}
    method = {"editor": editor, "objective": {"name": "native"}, "out": str(folder / "edits")}
    with pytest.MonkeyPatch.context() as patch:
        inline_pipeline.install(patch)
        odedit_in(folder, settings | method, "edit")
    backbone = load_backbone("blip2", "embedded")
    first = next(iter(sorted((folder / "edits" / "edits").glob("*.safetensors"))))
    loaded, params, _ = load_edits([first], backbone)
    export(backbone, loaded, params, folder / "merged")
    return settings, folder / "edits", folder / "merged"


def odedit_in(folder: Path, settings: Settings, command: str, *arguments: str) -> Result:
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = CliRunner().invoke(app, [command, *arguments, "--config", str(path)])
    return done


def rows_of(out: Path) -> list[dict[str, Any]]:
    return list(results.read_rows(results.parts(Workspace.of(out))))


@pytest.fixture
def scored(
    edited: tuple[Settings, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Result, Path]]:
    """Function that scores a model, and returns the command's result and its folder."""
    inline_pipeline.install(monkeypatch)
    out = tmp_path / "scored"
    return lambda model, *options: (
        odedit_in(tmp_path, edited[0] | {"out": str(out)}, "score", str(model), *options),
        out,
    )


def test_the_scores_of_a_merged_edit_are_those_of_the_edit(
    edited: tuple[Settings, Path, Path], scored: Callable[..., tuple[Result, Path]]
) -> None:
    done, out = scored(edited[2])
    assert done.exit_code == 0, done.output
    rows, (single, *_) = rows_of(out), rows_of(edited[1])
    assert [row["index"] for row in rows] == list(range(5))
    assert {name: value for name, value in rows[0].items() if name not in NOT_SCORES and value is not None} == {
        name: value for name, value in single.items() if name not in NOT_SCORES and value is not None
    }
    assert rows[0]["answer_before"] != rows[0]["answer_after"]
    assert {(row["status"], row["editor"], row["model"]) for row in rows} == {("edited", "checkpoint", str(edited[2]))}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n"] == 5 and summary["metrics"]["rel"]["mean"] < 1
    assert (out / "report.html").exists() and not list((out / "edits").iterdir())


def test_a_model_against_itself_keeps_everything(scored: Callable[..., tuple[Result, Path]], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("who owns this digit? what is the capital of arland?\n" * 9)
    done, out = scored(CHECKPOINT, "--text", str(tmp_path / "text.txt"))
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "summary.json").read_text())
    for name in ("t_loc", "m_loc"):
        assert summary["metrics"][name]["mean"] == 1
    assert summary["kept"] == summary["kept_text"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 7}
    assert summary["kept_of"] == "data.pool" and "of 7 answers to the pool's questions are as before" in done.stdout
    assert summary["text"]["nll_before"] == summary["text"]["nll_after"] > 0
    (tmp_path / "text.txt").write_text("which colour is it?\n" * 4)
    shutil.copy(tmp_path / "text.txt", tmp_path / "other.txt")
    scored(CHECKPOINT, "--text", str(tmp_path / "other.txt"))
    assert json.loads((out / "summary.json").read_text())["text"]["file"].endswith("other.txt")


def test_an_interrupted_run_resumes_with_the_same_rows(
    edited: tuple[Settings, Path, Path], scored: Callable[..., tuple[Result, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = actor.ScoreActor._process

    def dies(self: Any, records: Any, requests: Any) -> Any:
        asked.extend(record.index for record in records)
        if 2 in asked and not dies.over:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return whole(self, records, requests)

    dies.over = False  # type: ignore[attr-defined]
    monkeypatch.setattr(actor.ScoreActor, "_process", dies)
    done, out = scored(edited[2])
    assert done.exit_code == 130 and len(rows_of(out)) == 2 and not (out / "summary.json").exists()
    dies.over = True  # type: ignore[attr-defined]
    asked.clear()
    done, out = scored(edited[2])
    assert done.exit_code == 0 and asked == [2, 3, 4]
    resumed, kept_before = rows_of(out), parquet.read_table(out / "kept.parquet")
    done, out = scored(edited[2], "--fresh")
    assert done.exit_code == 0 and rows_of(out) == resumed
    assert parquet.read_table(out / "kept.parquet") == kept_before


def test_another_model_in_the_same_folder_is_refused(
    edited: tuple[Settings, Path, Path], scored: Callable[..., tuple[Result, Path]]
) -> None:
    assert scored(CHECKPOINT)[0].exit_code == 0
    for options in ((), ("--dry-run",)):
        done, out = scored(edited[2], *options)
        assert done.exit_code == 2 and "model.weights: was" in done.output and "--fresh" in done.output
    assert scored(edited[2], "--fresh")[0].exit_code == 0
    assert {row["model"] for row in rows_of(out)} == {str(edited[2])}


def test_a_configuration_that_commits_scores_every_record_and_commits_none(
    edited: tuple[Settings, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    added = write_array(tmp_path / "new.json", [record(5, edit_id="new")])
    commits = {"commit": {"way": "joint", "add": [str(added)]}, "out": str(tmp_path / "out")}
    done = odedit_in(tmp_path, edited[0] | commits, "score", str(edited[2]))
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    rows = rows_of(out)
    assert [row["edit_id"] for row in rows][5:] == ["new"] and "supervision_given" not in rows[5]
    workspace = Workspace.of(out)
    assert command(load(workspace.config), is_scored=True) == "score" and not is_commit(read_json(workspace.run))
    (out / "model").mkdir()
    (out / "model" / "mine.txt").write_text("mine")
    write_array(added, [record(5, edit_id="other")])
    done = odedit_in(tmp_path, edited[0] | commits, "score", str(edited[2]))
    assert done.exit_code == 2 and "commit.add 0: was" in done.output
    done = odedit_in(tmp_path, edited[0] | commits, "score", str(edited[2]), "--fresh")
    assert done.exit_code == 0 and rows_of(out)[5]["edit_id"] == "other"
    assert (out / "model" / "mine.txt").read_text() == "mine"


def test_models_that_cannot_be_scored(scored: Callable[..., tuple[Result, Path]], tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("x")
    empty.mkdir()
    words = shutil.copytree(CHECKPOINT, tmp_path / "words")
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    names = tokenizer["model"]["vocab"]
    first, second = [word for word in names if word.isalpha()][:2]
    names[first], names[second] = names[second], names[first]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny = tiny_models.write("blip2", tmp_path / "tiny")
    for model, said in (
        (file, "there is no such folder"),
        (tmp_path / "lost", "there is no such folder"),
        (empty, "the folder holds neither config.json nor committed.safetensors"),
        (world.CHECKPOINTS / "llava", "family 'blip2' takes"),
        (words, "its tokenizer has another vocabulary"),
        (tiny, "Only a model with the same architecture"),
    ):
        for options in ((), ("--dry-run",)):
            done, out = scored(model, *options)
            message = " ".join(done.output.split())
            assert done.exit_code == 2 and said in message and f"model '{model}'" in message, (model, message)
            assert "backbone.checkpoint '" + str(model) not in message and not out.exists()
    done, out = scored(CHECKPOINT, "--text", str(empty))
    assert done.exit_code == 2 and "--text:" in done.output and not out.exists()


def test_left_out_records_fits_and_edited_facts(
    edited: tuple[Settings, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `odedit commit` hands over: rows with reasons, columns of the training, probes of others' facts."""
    inline_pipeline.install(monkeypatch)
    near = {"prompt": "What is object 1?", "target": "cat 1", "image": record(1)["image"]}
    fields = [record(number, fact=f"kind of {number}") for number in range(3)]
    fields[0]["probes"] = {"m_loc_near": near, "t_loc_near": {"prompt": "q", "target": "a", "fact": "kind of 2"}}
    fields.append(fields[0] | {"edit_id": "again"})
    path = write_array(tmp_path / "vqa_eval.json", fields)
    settings = edited[0] | {"data": edited[0]["data"] | {"path": str(path)}, "out": str(tmp_path / "out")}
    ready = prepare(without_method(from_dict(settings)))
    found = find(read_records(str(path)), ready.sources.reader)
    model = ScoredModel(
        str(edited[2]), edited=found.edited, left_out=found.reasons, fits={"vqa_eval-000001": Fit(7, "max_steps", 0.25)}
    )
    outcome = score_into(ready, QUIET, model)
    rows = list(results.read_rows(results.parts(outcome.workspace)))
    assert [row["status"] for row in rows] == ["edited"] * 3 + ["skipped"]
    assert rows[3]["error"].startswith("vqa_eval.json, record 3: left out: duplicate of vqa_eval.json, record 0")
    assert [(row["steps"], row["stop_reason"], row["worst_nll"]) for row in rows[:2]] == [
        (None, None, None), (7, "max_steps", 0.25),
    ]  # fmt: skip
    assert rows[0]["edited_gen_mlocnear"] is not None and rows[0]["edited_gen_tlocnear"] is not None
    assert rows[0].get("m_loc_near") is None and rows[0]["m_loc"] is not None
    summary = outcome.summary
    assert (summary["n"], summary["skipped"], summary["stop_reasons"]["max_steps"]) == (3, 1, 1)


def _answers(models: Compared, probes: list[Probe]) -> list[tuple[str, str]]:
    template, ends = find_template("mmedit"), models.unedited.ends
    made = []
    for model in (models.unedited, models.edited):
        assert model is not None
        asked = Questions(model, ["layers.0.ffn.in"], probes, [9] * len(probes), template)
        made.append([decoded(model, until_end(tokens, ends)[0]) for tokens in asked.answers()])
    return list(zip(*made, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_kept_is_whether_the_answers_are_the_same(edited: tuple[Settings, Path, Path], share: float) -> None:
    """The reference asks both models, question by question, and compares the words; edited questions are left out."""
    data = edited[0]["data"]
    reader = ImageReader(data["image_root"], data["rephrase_root"])
    items = [item for item in read_records(data["pool"])]
    pool = Pool([replace(item, fields={**item.fields, "fact": f"kind of {item.index}"}) for item in items], reader)
    backbone = load_backbone("blip2", "embedded")
    changed = load_backbone("blip2", str(edited[2]))
    for own, other in zip(changed.model.parameters(), backbone.model.parameters(), strict=True):
        own.data.lerp_(other.data, 1 - share)
    models = Compared(backbone, changed)
    template = find_template("mmedit")
    probes = [Probe(item.fields["src"], "", reader.read(item.fields["image"])) for item in pool.records]
    texts = [Probe(item.fields["loc"], "") for item in pool.records]
    same = [[before == after for before, after in _answers(models, asked)] for asked in (probes, texts)]
    rows = kept.kept_rows(models, pool, Edited(), template)
    assert [[row[name] for row in rows] for name in ("kept", "kept_text")] == same
    if share != 0.3:
        assert same == [[share < 0.3] * 7] * 2, "a tenth of the edit changes no answer, and the whole edit all"
    else:
        assert {True, False} == {value for values in same for value in values}, "nothing changes, or everything"
    picture = probes[1].picture
    assert picture is not None
    edits = Edited({"kind of 0": ("x", "y")}, {(picture.key, "what is object 6?"): ("x", "y")})
    assert kept.kept_rows(models, pool, edits, template) == rows[2:]


def test_perplexity_is_that_of_the_language_model(backbone: Any) -> None:
    text = "who owns this digit? which food does this number like? " * 12
    model = load_backbone("blip2", "embedded")
    nll, same, count = Compared(backbone, model).text_nll(text)
    tokenizer = backbone.processor.tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = backbone.max_positions - len(begin)
    assert len(tokens) > size, "one window"
    total, number = 0.0, 0
    for start in range(0, len(tokens), size):
        window = torch.tensor([[*begin, *tokens[start : start + size]]])
        loss = model.model.language_model(input_ids=window, labels=window).loss
        total, number = total + float(loss) * (window.shape[1] - 1), number + window.shape[1] - 1
    assert (nll, same, count) == (pytest.approx(total / number, rel=1e-5), nll, number)


def test_a_committed_model_is_scored_by_the_editor_that_serves_it(
    edited: tuple[Settings, Path, Path],
    scored: Callable[..., tuple[Result, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same parameters as a checkpoint and as a committed file give the same scores."""

    class Way(PlainWay):
        Config = WayConfig

    monkeypatch.setattr(committed_files, "plugin_names", lambda package: ("routed", "ftl"))
    monkeypatch.setattr(committed_files, "ways", SimpleNamespace(find=lambda name: Way))
    backbone = load_backbone("blip2", "embedded")
    first = next(iter(sorted((edited[1] / "edits").glob("*.safetensors"))))
    _, params, infos = load_edits([first], backbone)
    info = CommittedInfo(
        "routed", {}, "ftl", infos[0].editor_config, "blip2", "embedded", backbone.fingerprint, "float32", "mmedit",
        (infos[0].edit_id,),
    )  # fmt: skip
    (tmp_path / "commit" / "model").mkdir(parents=True)
    save_committed(tmp_path / "commit" / "committed.safetensors", params, info)
    by_folder = []
    for model in (tmp_path / "commit", tmp_path / "commit" / "model", edited[2]):
        done, out = scored(model, "--fresh")
        assert done.exit_code == 0, done.output
        by_folder.append([{k: v for k, v in row.items() if k not in NOT_SCORES} for row in rows_of(out)])
        kept_rows = parquet.read_table(out / "kept.parquet").to_pylist()
        by_folder[-1] += kept_rows
    assert by_folder[0] == by_folder[1] == by_folder[2]


@pytest.mark.ray
def test_on_ray(edited: tuple[Settings, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and the task that asks the pool give what the stages give in this process."""
    outs = [tmp_path / "ray", tmp_path / "inline"]
    for out in outs:
        if out.name == "inline":
            inline_pipeline.install(monkeypatch)
        done = odedit_in(tmp_path, edited[0] | {"out": str(out)}, "score", str(edited[2]))
        assert done.exit_code == 0, done.output
    assert_same(rows_of(outs[0]), rows_of(outs[1]))
    kept_rows = [parquet.read_table(out / "kept.parquet").to_pylist() for out in outs]
    assert kept_rows[0] == kept_rows[1]
