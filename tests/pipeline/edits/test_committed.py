"""The edits of a committed model as a list, and its model card, whose program runs without odedit."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from odedit import InputError
from odedit.__main__ import app
from odedit.storage.location import locate
from odedit.ways.common.files import load_committed, save_committed
from pipeline.edits import listing
from pipeline.report.formatting import number
from pipeline.report.model_card import cell, write_model_card
from pipeline.run_folder.committed import entry, read_edits, worst_first, write_edits
from pipeline.run_folder.outcomes import mean_score
from tests.support import committed
from tests.support.committed import TARGETS, Model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = committed.make(tmp_path_factory.mktemp("committed"), "minigpt4")
    write_edits(model.outcome.workspace)
    return model


def odedit(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_list_has_an_entry_per_edit(made: Model) -> None:
    listed = read_edits(locate(str(made.out), "MODEL"))
    assert listed == read_edits(locate(str(made.out / "model"), "MODEL"))
    info = json.loads((made.out / "model" / "edits.json").read_text())["info"]
    assert (info["family"], info["template"], info["checkpoint"]) == ("minigpt4", "mmedit", "embedded")
    assert [each["prompt"] for each in listed] == [question for question, _ in made.questions]
    assert [each["image"] for each in listed] == [image for _, image in made.questions]
    assert [each["target"] for each in listed] == list(TARGETS)
    assert [each["holds"] for each in listed] == [True, True, False], "the third answer does not end"
    assert all(each["scores"]["rel"] == 1.0 and each["answer_before"] for each in listed)
    assert not any(name.endswith("_before") or name == "seconds" for name in listed[0]["scores"])


def test_the_command_lists_the_worst_first(made: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads((made.out / "model" / "edits.json").read_text())
    values["edits"][1] |= {"holds": False, "answer_after": "=[red]wrong[/red]"}
    (tmp_path / "edits.json").write_text(json.dumps(values))
    rows = list(csv.DictReader(io.StringIO(odedit("edits", tmp_path, "--csv").stdout)))
    assert [row["holds"] for row in rows] == ["False", "False", "True"]
    assert rows[2]["edit_id"] == values["edits"][0]["edit_id"] and float(rows[2]["rel"]) == 1.0
    monkeypatch.setenv("COLUMNS", "200")
    result = odedit("edits", tmp_path, "--failed")
    assert "0 of 2 hold" in result.stdout and "=[red]wrong[/red]" in result.stdout
    assert "2 of 3 hold" in odedit("edits", made.out).stdout
    missing = odedit("edits", tmp_path / "none")
    assert missing.exit_code == 2 and "no edits.json there" in missing.output
    (tmp_path / "edits.json").write_text('{"format": "odedit-model-1", "edits": [1]}')
    with pytest.raises(InputError, match="damaged"):
        read_edits(locate(str(tmp_path), "MODEL"))


def test_a_question_that_all_edits_share_is_said_once(made: Model) -> None:
    first, second, _ = read_edits(locate(str(made.out / "model"), "MODEL"))
    second = second | {"prompt": first["prompt"], "image": "deep/in/a/folder.png"}
    console = Console(width=100, file=io.StringIO())
    console.print(listing.table([first, second]))
    console.print(listing.table([first]))
    both, alone = console.file.getvalue().split("2 of 2 hold")
    assert f"Question: {first['prompt']}" in both and both.count(first["prompt"]) == 1
    assert " folder.png " in both and "deep" not in both
    assert "Question:" not in alone and "question" in alone
    assert listing.shared_question(["a", "b"]) is None and listing.shared_question([None, None]) is None
    narrow = Console(width=80, file=io.StringIO())
    missing = dict.fromkeys(("prompt", "image", "answer_after"))
    bare = second | missing | {"edit_id": "the-name-of-a-long-answer-eff333d775"}
    narrow.print(listing.table([first, bare]))
    lines = narrow.file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    (whole,) = [line for line in lines if first["edit_id"] in line]
    (folded,) = [line for line in lines if bare["edit_id"][:22] in line]
    means = [number(mean_score(entry["scores"]) or 0.0) for entry in (first, bare)]
    assert [line.split()[-1] for line in (whole, folded)] == means, "no column is cut off"


def test_an_edit_without_its_answer_does_not_hold() -> None:
    row = {"edit_id": "a", "status": "edited", "rel": 1.0, "rel_exact": 1.0, "rel_generated_exact": 0.0}
    assert not entry(row, None)["holds"]
    assert entry(row | {"rel_generated_exact": None}, None)["holds"]
    assert not entry(row | {"status": "failed", "rel_generated_exact": 1.0}, None)["holds"]
    good, bad = entry(row | {"rel_generated_exact": 1.0}, None), entry(row, None)
    assert worst_first([good, bad]) == [bad, good]


def test_the_cards_program_gives_the_edited_answer(made: Model, tmp_path: Path) -> None:
    file = write_model_card(made.outcome.workspace, made.config, made.outcome.summary)
    card = file.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "embedded" and front["pipeline_tag"] == "image-text-to-text"
    assert front["library_name"] == "transformers"
    for text in ("3 edits", "2 of them hold", "who owns digit 0?", "`rel` reliability", "image locality: ",
                 str(made.backbone.fingerprint), "name: ftl"):  # fmt: skip
        assert text in card, text
    assert str(made.out.parent) not in card and "/tmp" not in card
    assert all(line.startswith("|") == line.endswith("|") for line in card.splitlines())
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(program.strip().splitlines()) <= 13
    folder = tmp_path / "model"
    shutil.copytree(made.out / "model", folder)
    shutil.copy(made.images / made.questions[0][1], folder / "picture.png")
    assert committed.without_odedit(program, cwd=folder).strip() == TARGETS[0]


def test_a_card_takes_no_markup_or_path_from_records(made: Model, tmp_path: Path) -> None:
    workspace = made.outcome.workspace
    file = made.out / "model" / "edits.json"
    before = file.read_text()
    values = json.loads(before)
    values["edits"][0] |= {"prompt": "a|b\n# title <script>```", "target": "x" * 500}
    file.write_text(json.dumps(values))
    params, info = load_committed(made.out / "committed.safetensors")
    settings = {"checkpoint": "/data/secret/weights.safetensors"}
    save_committed(made.out / "committed.safetensors", params, replace(info, editor_config=settings))
    card = write_model_card(workspace, made.config, made.outcome.summary).read_text()
    file.write_text(before)
    save_committed(made.out / "committed.safetensors", params, info)
    assert "| a\\|b # title \\<script\\>\\`\\`\\` |" in card
    assert "/data" not in card and "checkpoint: weights.safetensors" in card
    assert max(map(len, card.splitlines())) < 600 and cell(None) == ""
