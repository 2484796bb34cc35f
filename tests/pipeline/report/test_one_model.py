"""What a report says about a committed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from odedit.ways.base import CommittedInfo
from odedit.ways.common.files import save_committed
from pipeline.report.one_model import one_model
from pipeline.report.run_page import Baseline, write_run_report
from pipeline.run_folder.committed import SINGLE
from pipeline.run_folder.rows import EDITED, SKIPPED, Row
from pipeline.run_folder.workspace import Workspace, read_json, write_json
from tests.support.finished_runs import write_run


def in_one_model(row: Row) -> None:
    """Of the edits that do not hold, one says what another edit says, and one something new."""
    if row["index"] in (4, 8):
        row["answer_after"] = {4: "Dog  1", 8: "a fish"}[row["index"]]
    if row["status"] == SKIPPED:
        row["error"] = "vqa.json, record 13: left out: it contradicts vqa.json, record 1 (vqa-000001): ..."


def hold(row: Row) -> None:
    """All edits but one hold alone."""
    if row["status"] == EDITED and row["index"] != 0:
        row |= {"rel": 1.0, "rel_generated_exact": 1.0}


def commit(workspace: Workspace, **details: Any) -> Workspace:
    """Makes the run one that committed a model with these details."""
    info = CommittedInfo("joint", {}, "lora", {}, "blip2", "embedded", "", "float32", "mmedit", details=details)
    save_committed(workspace.committed, {"a": torch.zeros(1)}, info)
    return workspace


@pytest.fixture
def committed(tmp_path: Path) -> Workspace:
    return commit(write_run(tmp_path / "run", 12, in_one_model))


def report(workspace: Workspace, baseline: Baseline | None = None) -> str:
    return write_run_report(workspace, read_json(workspace.summary), baseline=baseline).read_text()


def test_edits_that_do_not_hold_are_told_by_their_answers_and_contradictions_are_named(
    committed: Workspace,
) -> None:
    model = one_model(committed)
    assert model is not None and (model.count, model.held) == (12, 9)
    kinds = ("the answer of the unedited model", "the new answer of another edit", "something else")
    assert model.instead == dict.fromkeys(kinds, 1)
    assert (model.num_alone, model.num_lost) == (0, 0), "there are no single edits"
    assert model.unlearned == 1, "of NLL 0.0, 0.4 and 0.8, one is above ln 2"
    assert model.num_contradictions == 1 and "it contradicts" in model.contradictions[0]
    text = report(committed)
    assert "No edit was made alone" in text and "1 of these has not been learned" in text
    assert "Contradictions: 1 left out of the model" in text


def test_interference_is_what_held_alone_and_does_not_hold_in_the_model(committed: Workspace) -> None:
    write_run(Path(committed.out) / SINGLE, 12, hold)
    model = one_model(committed)
    assert model is not None
    assert (model.num_alone, model.alone, model.num_lost) == (12, 11, 2)
    assert model.lost == ["vqa-000004", "vqa-000008"]
    text = report(committed)
    assert "<strong>9 of 12</strong> edits hold in the model" in text
    assert '<a href="#edit=vqa-000004">' in text and "Contradictions: 1 left out of the model" in text


def test_scores_of_the_single_edits_are_beside_those_of_the_model(committed: Workspace, tmp_path: Path) -> None:
    write_run(Path(committed.out) / SINGLE, 12, hold)
    text = report(committed)
    assert '<th scope="col" class="number">alone</th>' in text and "-0.167 [" in text, "2 of 12 are lost"
    assert '"baseline":"alone"' in text, "the gallery can be filtered and sorted by the loss"
    other = report(committed, Baseline.of("base", write_run(tmp_path / "base", 12)))
    assert '"baseline":"base"' in other, "a baseline that is given comes first"


def test_edits_of_another_run_are_known_from_the_settings(committed: Workspace, tmp_path: Path) -> None:
    few = write_run(tmp_path / "edits of before (2)", 6, hold)
    state = read_json(committed.run) | {"settings": {"--from": f"{few.out} (0123456789abcdef)"}}
    write_json(committed.run, state)
    model = one_model(committed)
    assert model is not None and (model.num_alone, model.alone, model.lost) == (6, 5, ["vqa-000004"])
    assert "6 of the edits were made alone too, and 5 of these held" in report(committed)


def test_single_edits_of_an_earlier_run_in_the_folder_are_none_of_a_way_that_uses_no_edits(
    committed: Workspace,
) -> None:
    write_run(Path(committed.out) / SINGLE, 12, hold)
    for way, num_alone in (("sum", 12), ("joint", 0)):
        write_json(committed.run, read_json(committed.run) | {"settings": {"commit.way": way}})
        model = one_model(committed)
        assert model is not None and model.num_alone == num_alone


def test_curves_of_the_training_are_drawn(tmp_path: Path) -> None:
    curves = {"step": [50.0, 100.0, 1200.0], "worst_nll": [6.5, 2.0, 0.03], "threshold": [0.4]}
    workspace = commit(write_run(tmp_path / "run", 4), curves=curves)
    text = report(workspace)
    assert "least likely token's NLL over all records: 6.5 → 0.03" in text.replace("&#39;", "'")
    assert '<polyline points="0,2 ' in text and "step 50 to 1,200" in text
    assert "threshold: 0.4</figcaption>" in text


def test_a_model_of_a_study_leads_to_its_curve_over_the_number_of_records(tmp_path: Path) -> None:
    (tmp_path / "arms").mkdir()
    workspace = commit(write_run(tmp_path / "arms" / "joint_8_0", 4))
    assert "odedit study scale" in report(workspace), "the folder alone makes no study"
    (tmp_path / "study.json").write_text("{}")
    text = report(workspace)
    for name in ("table.md", "plot.png"):
        assert f'<a href="../../{name}">' in text
    assert "odedit study scale" not in text


def test_a_run_without_a_committed_model_has_no_such_section(tmp_path: Path) -> None:
    workspace = write_run(tmp_path / "run", 3)
    write_run(Path(workspace.out) / SINGLE, 3)
    assert one_model(workspace) is None
    text = report(workspace)
    assert "One model" not in text and '"baseline":null' in text
