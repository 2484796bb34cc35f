"""Finished runs in a notebook: data frames, edits, and HTML without markup of records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import odedit
from odedit.errors import InputError
from tests.support.finished_runs import SCRIPT, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    return odedit.open_run(str(write_run(tmp_path_factory.mktemp("notebook") / "run", 6).out))


def test_rows_are_a_data_frame_and_the_summary_has_means(run) -> None:
    frame = run.to_pandas()
    assert len(frame) == 8 and list(frame["status"]) == ["edited"] * 6 + ["failed", "skipped"]
    assert frame["rel"].mean() == pytest.approx(run.summary["metrics"]["rel"]["mean"]) == pytest.approx(4 / 6)
    assert frame["answers"][1]["rel"] == {"before": "cat 1", "after": "dog 1"}
    assert list(frame["losses"][0]["rel"]) == [3.0, 1.0, 0.5]
    assert list(run.to_pandas(["edit_id", "rel"]).columns) == ["edit_id", "rel"]
    with pytest.raises(InputError, match="the run has no column 'reliability'; it has index, edit_id"):
        run.to_pandas(["reliability"])


def test_an_edit_has_its_probes_and_its_html_the_pictures(run) -> None:
    edit = run.edit("vqa-000004")
    assert (edit.holds, edit.old_answer, edit.row["steps"]) == (False, "cat 4", 14)
    assert [probe.name for probe in edit.probes] == ["rel", "t_gen", "m_gen", "t_loc", "m_loc", "m_loc_near"]
    assert repr(edit) == "RunEdit('vqa-000004': does not hold, 'cat 4')"
    html = edit._repr_html_()
    assert html.count('<img style="max-width: 6rem" src="data:image/webp;base64,') == 5
    assert re.search(r">✗ cat 4</span>", html) and re.search(r">= red</span>", html)
    with pytest.raises(InputError, match="has no edit 'vqa-4'"):
        run.edit("vqa-4")


def test_a_run_is_short_in_print_and_shows_its_worst_edits_as_html(run) -> None:
    assert repr(run) == f"Run({str(run.workspace.out)!r}: 6 edits, 1 failed, 1 skipped)"
    html = run._repr_html_()
    assert "0.667 [" in html and "record 6: it is failed." in html
    ids = [edit.edit_id for edit in run.worst(3)]
    assert ids[:2] == ["vqa-000000", "vqa-000004"] and all(edit_id in html for edit_id in ids)
    assert SCRIPT not in run.edit("vqa-000001")._repr_html_()
    assert "&lt;script&gt;" in run.edit("vqa-000001")._repr_html_()
    assert "skipped" in run.edit("vqa-000007")._repr_html_()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder '.*': there is no run"):
        odedit.open_run(str(tmp_path))
