"""The page of several runs side by side."""

from __future__ import annotations

import re
from pathlib import Path

from odedit.storage.location import at
from pipeline.report import page
from pipeline.report.run_page import write_run_report
from pipeline.run_folder.rows import EDITED, Row
from pipeline.run_folder.workspace import read_json
from tests.support.finished_runs import SCRIPT, write_run

LINES = ["rel", "t_gen", "m_gen", "t_loc", "m_loc", "m_loc_near", "m_loc_far", "seconds"]


def hostile(row: Row) -> None:
    if row["status"] != EDITED:
        row["error"] += SCRIPT


def test_runs_side_by_side_lead_to_the_pages_of_every_run(tmp_path: Path) -> None:
    arms = []
    for name in ("first", "second"):
        workspace = write_run(tmp_path / name, 6, hostile)
        summary = read_json(workspace.summary)
        write_run_report(workspace, summary)
        arms.append(page.Arm(name, workspace, summary))
    model = write_run(tmp_path / "in one", 6)
    written = Path(page.write_comparison(at(tmp_path), arms, {"one model": model}))
    text = written.read_text()
    assert written == tmp_path / "report.html" and "first against second" in text
    for name in ("first", "second"):
        assert f'<a href="{name}/report.html">' in text and (tmp_path / name / "report.html").is_file()
    assert '<a href="in%20one/report.html">one model</a>' in text
    assert SCRIPT not in text and "&lt;script&gt;" in text, "texts of records are no markup"
    assert text.count('<th scope="row">second</th>') == len(LINES)
    assert re.findall("<code>(\\w+)</code>", text) == LINES[:-1]


def test_differences_are_to_the_first_run(tmp_path: Path) -> None:
    def better(row: Row) -> None:
        if row["status"] == EDITED:
            row["rel"] = 1.0

    arms = []
    for name, change in (("a", lambda row: None), ("b", better)):
        workspace = write_run(tmp_path / name, 24, change)
        arms.append(page.Arm(name, workspace, read_json(workspace.summary)))
    text = Path(page.write_comparison(at(tmp_path), arms)).read_text()
    rel = text[text.index("<code>rel</code>") : text.index("<code>t_gen</code>")]
    assert "+0.250 [" in rel and rel.count('<tr class="clear">') == 1
    assert rel.index(">a</th>") < rel.index(">b</th>") and "0.750 [" in rel
