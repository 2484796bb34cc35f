"""What a report says about a committed model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report.one_model import one_model
from pipeline.report.run_page import write_run_report
from pipeline.run_folder.committed import SINGLE
from pipeline.run_folder.rows import EDITED, SKIPPED, Row
from pipeline.run_folder.workspace import Workspace, read_json
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


@pytest.fixture
def committed(tmp_path: Path) -> Workspace:
    workspace = write_run(tmp_path / "run", 12, in_one_model)
    workspace.committed.write_bytes(b"")
    return workspace


def test_edits_that_do_not_hold_are_told_by_their_answers_and_contradictions_are_named(committed: Workspace) -> None:
    model = one_model(committed)
    assert model is not None and (model.count, model.held) == (12, 9)
    kinds = ("the answer of the unedited model", "the new answer of another edit", "something else")
    assert model.instead == dict.fromkeys(kinds, 1)
    assert (model.alone, model.num_lost) == (None, 0), "there are no single edits"
    assert len(model.contradictions) == 1 and "it contradicts" in model.contradictions[0]


def test_interference_is_what_held_alone_and_does_not_hold_in_the_model(committed: Workspace) -> None:
    write_run(Path(committed.out) / SINGLE, 12, hold)
    model = one_model(committed)
    assert model is not None
    assert (model.alone, model.num_lost, model.lost) == (11, 2, ["vqa-000004", "vqa-000008"])
    text = write_run_report(committed, read_json(committed.summary)).read_text()
    assert "<strong>9 of 12</strong> edits hold in the model" in text
    assert '<a href="#edit=vqa-000004">' in text and "Contradictions, left out of the model" in text


def test_a_run_without_a_committed_model_has_no_such_section(tmp_path: Path) -> None:
    workspace = write_run(tmp_path / "run", 3)
    assert one_model(workspace) is None
    assert "One model" not in write_run_report(workspace, read_json(workspace.summary)).read_text()
