"""The report of one run, as text: what is in it, what is left out, and that no text of a record is markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from pipeline.report import run_page
from pipeline.report.run_page import Baseline, probe_label, write_run_report
from pipeline.run_folder.rows import EDITED, Row
from pipeline.run_folder.summary import summarize_kept
from pipeline.run_folder.workspace import Workspace, read_json, write_json, write_table
from tests.support.finished_runs import SCRIPT, write_run


def report(workspace: Workspace, **named: Any) -> str:
    return write_run_report(workspace, read_json(workspace.summary), **named).read_text()


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    values: dict[str, Any] = json.loads(match.group(1))
    return values


def test_the_page_has_every_record_worst_first_with_its_answers(tmp_path: Path) -> None:
    data = data_of(report(write_run(tmp_path / "run", 12)))
    assert [edit.get("holds") for edit in data["edits"]] == [False] * 3 + [True] * 9 + [None] * 2
    assert [edit["status"] for edit in data["edits"][-2:]] == ["failed", "skipped"]
    means = [edit["mean"] for edit in data["edits"][:3]]
    assert means == sorted(means)
    worst = data["edits"][0]
    assert worst["id"] == "vqa-000000" and worst["old"] == "cat 0"
    names = [probe["name"] for probe in data["probes"]]
    probes = {names[values[0]]: values[1:] for values in worst["probes"]}
    assert list(probes) == ["rel", "t_gen", "m_gen", "t_loc", "m_loc", "m_loc_near"]
    question, target, picture, file, before, after, score, is_right, was_right = probes["rel"]
    assert (question, target, file, before, after) == ("What is object 0?", "dog 0", "0.png", "cat 0", "cat 0")
    assert (score, is_right, was_right) == (0.0, False, False)
    assert probes["m_gen"][:2] == [0, 0] and probes["m_gen"][2] != picture, "the same question, another picture"
    assert probes["t_loc"][4:6] == ["red", "blue"] and probes["t_loc"][7:] == [False, None]
    assert data["curves"][worst["id"]] == {"rel": [3.0, 1.0, 0.5]}, "a curve of zeros is not drawn"
    assert len(data["pictures"]) == 5, "equal pictures are in the page once"
    assert all(base64.b64decode(each)[8:12] == b"WEBP" for each in data["pictures"])


def test_texts_of_records_are_no_markup_and_only_the_page_s_own_script_runs(tmp_path: Path) -> None:
    def change(row: Row) -> None:
        if row["status"] == EDITED:
            row["answers"]["t_gen"]["after"] = SCRIPT
        else:
            row["error"] = f"vqa.json, record {row['index']}: {SCRIPT}"

    text = report(write_run(tmp_path / "run", 3, change))
    assert SCRIPT not in text and "<img src=x" not in text
    assert SCRIPT in {values[6] for edit in data_of(text)["edits"] for values in edit["probes"]}
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    allowed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in text
    assert "http" not in text.replace("http-equiv", ""), "the page needs no network"


def test_a_run_of_an_earlier_version_without_pictures_has_a_report(tmp_path: Path) -> None:
    workspace = write_run(tmp_path / "run", 4, lambda row: row.pop("answers", None))
    shutil.rmtree(tmp_path / "data")
    text = report(workspace)
    assert "The pictures were not there" in text and "is of an earlier version" in text
    probes = data_of(text)["edits"][0]["probes"]
    assert probes[0][5:7] == ["cat 0", "cat 0"] and probes[1][5:7] == [None, None]
    assert probes[1][8] is False, "right or wrong is known from the scores"


def test_a_large_run_has_its_worst_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = write_run(tmp_path / "run", 40)
    whole = data_of(report(workspace))
    for name, value in (("MAX_EDITS", 20), ("MAX_TEXT_BYTES", 6000), ("MAX_PICTURE_BYTES", 900), ("MAX_CURVES", 2)):
        monkeypatch.setattr(run_page, name, value)
    text = report(workspace)
    data = data_of(text)
    assert "The worst 20 of 42 records" in text
    assert [edit["id"] for edit in data["edits"]] == [edit["id"] for edit in whole["edits"][:20]]
    bare = [edit for edit in data["edits"] if "probes" not in edit]
    assert 0 < len(bare) < 20 and bare == data["edits"][-len(bare) :]
    assert f"Answers of the last {len(bare)} edits are left out" in text
    assert "Pictures of the last edits are left out" in text and sum(map(len, data["pictures"])) <= 900
    assert list(data["curves"]) == [edit["id"] for edit in data["edits"][:2]]


def test_long_texts_of_a_record_are_cut(tmp_path: Path) -> None:
    def lengthen(row: Row) -> None:
        row["fact"] = "fact " * 200
        row["answer_after"] = "after " * 200
        if row["status"] != EDITED:
            row["error"] = "error " * 200

    data = data_of(report(write_run(tmp_path / "run", 2, lengthen)))
    first, last = data["edits"][0], data["edits"][-1]
    assert {len(first["fact"]), len(first["probes"][0][6]), len(last["error"])} == {300}
    assert first["fact"].endswith(" ...")


def test_the_baseline_s_difference_is_over_the_common_edits(tmp_path: Path) -> None:
    def better(row: Row) -> None:
        if row["status"] == EDITED:
            row["rel"] = 1.0
        if row["index"] == 5:
            row |= {"status": "failed", "error": "vqa.json, record 5: no."}

    workspace = write_run(tmp_path / "run", 12)
    text = report(workspace, baseline=Baseline.of("<base>", write_run(tmp_path / "base", 12, better)))
    assert "&lt;base&gt;" in text and "<base>" not in text
    assert "-0.273 [" in text, "3 of the 11 common edits are right in the baseline alone"
    edits = {edit["id"]: edit for edit in data_of(text)["edits"]}
    assert "base" not in edits["vqa-000005"]
    assert edits["vqa-000000"]["base"] == pytest.approx(edits["vqa-000000"]["mean"] + 0.2)


def test_kept_answers_are_compared_with_the_baseline_over_the_common_records(tmp_path: Path) -> None:
    def write(name: str, answers: list[bool]) -> Workspace:
        workspace = write_run(tmp_path / name, 4)
        rows = [{"edit_id": f"pool-{at}", "fact": f"fact {at}", "kept": kept, "kept_text": None}
                for at, kept in enumerate(answers)]  # fmt: skip
        schema = pyarrow.schema([("edit_id", pyarrow.string()), ("fact", pyarrow.string()),
                                 ("kept", pyarrow.bool_()), ("kept_text", pyarrow.bool_())])  # fmt: skip
        write_table(workspace.kept, pyarrow.Table.from_pylist(rows, schema=schema))
        write_json(workspace.summary, read_json(workspace.summary) | summarize_kept(workspace))
        return workspace

    base, own = write("base", [True, True, True, True, False]), write("run", [True, True, False, False])
    text = report(own, baseline=Baseline.of("base", base))
    line = text[text.index("other answers kept") :]
    assert "-0.500 [" in line[: line.index("</tr>")], "two of the four records that both asked"


def test_whole_numbers_are_shown_as_such(tmp_path: Path) -> None:
    def equal(row: Row) -> None:
        if row["status"] == EDITED:
            row["steps"] = 400

    text = report(write_run(tmp_path / "run", 12, equal))
    assert "<dt>Steps per edit</dt><dd>400</dd>" in text and "400.000" not in text
    text = report(write_run(tmp_path / "other", 12))
    # 10 to 16 steps, of 12 edits.
    assert re.search(r"<dd>12\.6 \[[\d.]+, [\d.]+\]</dd>", text)
    assert 'aria-label="Edits by steps: 10: 2, 11: 2, 12: 2, 13: 2, 14: 2, 15: 1, 16: 1"' in text
    assert "Edits by reliability: 0 to 0.1: 3, 0.1 to 0.2: 0" in text


def test_a_run_without_an_edit_has_a_report(tmp_path: Path) -> None:
    def skip(row: Row) -> None:
        error = row.get("error") or f"vqa.json, record {row['index']}: image 'x.png' is not there."
        kept = {name: row[name] for name in ("index", "edit_id", "file", "task", "prompt", "target")}
        row.clear()
        row |= kept | {"status": "skipped", "error": error}

    text = report(write_run(tmp_path / "run", 3, skip))
    assert "No record was edited." in text and "3 skipped, the first:" in text


def test_an_answer_that_another_record_edits_is_under_its_own_name(tmp_path: Path) -> None:
    def edited(row: Row) -> None:
        if row["status"] == EDITED:
            for name in [name for name in row if name.startswith("m_loc_near")]:
                row[name.replace("m_loc_near", "edited_gen_mlocnear")] = row.pop(name)
            row["answers"]["edited_gen_mlocnear"] = row["answers"].pop("m_loc_near")

    data = data_of(report(write_run(tmp_path / "run", 4, edited)))
    number, question, target, *_ = data["edits"][0]["probes"][-1]
    label = "what another record edits (mlocnear)"
    assert data["probes"][number] == {"name": "edited_gen_mlocnear", "label": label, "locality": False}
    assert (question, target) == (0, None), "the right answer is the other record's"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("rel", "reliability"),
        ("m_loc_near", "image locality, near"),
        ("tm_gen", "text and image generality"),
        ("odd", "odd"),
    ],
)
def test_labels_of_probes(name: str, label: str) -> None:
    assert probe_label(name) == label
