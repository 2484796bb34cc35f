"""The page of several runs side by side."""

from __future__ import annotations

from pathlib import Path

from odedit.storage.location import at
from pipeline.report import page
from pipeline.report.run_page import write_run_report
from pipeline.run_folder.workspace import read_json
from tests.support.finished_runs import SCRIPT, write_run


def test_runs_side_by_side_lead_to_the_pages_of_every_run(tmp_path: Path) -> None:
    arms = []
    for name in ("first", "second"):
        workspace = write_run(tmp_path / name, 6)
        summary = read_json(workspace.summary)
        write_run_report(workspace, summary)
        arms.append(page.Arm(name, workspace, summary))
    written = Path(page.write_comparison(at(tmp_path), arms))
    text = written.read_text()
    assert written == tmp_path / "report.html" and "first against second" in text
    for name in ("first", "second"):
        assert f'<a href="{name}/report.html">' in text and (tmp_path / name / "report.html").is_file()
    assert SCRIPT not in text and "&lt;script&gt;" in text, "texts of records are no markup"
