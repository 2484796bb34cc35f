"""`odedit show` and `odedit report`: on the command line, on the folders of finished runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from odedit.errors import InputError
from pipeline import commands
from pipeline.edits import show
from pipeline.run_folder.outcomes import find_outcome, picture_reader
from pipeline.run_folder.workspace import Workspace
from tests.support.finished_runs import SCRIPT, write_run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return write_run(tmp_path_factory.mktemp("show") / "run", 6)


def shown(workspace: Workspace, edit_id: str, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=120, **options)
    show.show(find_outcome(workspace, edit_id), picture_reader(workspace), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_an_edit_is_shown_with_its_probes_signs_and_picture_s_file(workspace: Workspace) -> None:
    text = shown(workspace, "vqa-000004")
    lines = {line.split("  ")[0].strip(): " ".join(line.split()) for line in text.splitlines()}
    assert lines["vqa-000004"] == "vqa-000004 ✗ does not hold"
    assert lines["old answer"].endswith("cat 4") and lines["wanted"].endswith("dog 4")
    assert lines["after"] == "after ✗ cat 4" and "14 steps" in lines["scores"]
    assert lines["picture"].endswith("/coco/4.png") and Path(lines["picture"].split()[1]).is_file()
    assert lines["m_gen"] == "m_gen What is object 4? dog 4 ✗ cat 4 ✓ dog 4 1.000"
    assert lines["t_loc"] == "t_loc who wrote book 4 red = red 1.000"


def test_markup_of_a_record_and_a_skipped_record_are_shown_as_they_are(workspace: Workspace) -> None:
    assert SCRIPT in " ".join(shown(workspace, "vqa-000001").split())
    text = shown(workspace, "vqa-000007")
    assert text.startswith("vqa-000007  skipped") and "record 7: it is skipped." in text


@pytest.mark.parametrize(("kind", "start"), [("SixelImage", "\x1bP"), ("TGPImage", "\U0010eeee")])
def test_a_terminal_that_draws_pictures_gets_the_picture(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, kind: str, start: str
) -> None:
    renderable = pytest.importorskip("textual_image.renderable")
    plain = shown(workspace, "vqa-000000", force_terminal=True)
    monkeypatch.setattr(renderable, "Image", getattr(renderable, kind))
    drawn = shown(workspace, "vqa-000000", force_terminal=True)
    assert start in drawn and start not in plain
    assert start not in shown(workspace, "vqa-000000"), "no picture in a file"


def test_without_an_id_the_worst_edits_are_listed(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    commands.show(str(workspace.out), None)
    text = capsys.readouterr().out
    ids = [line.split()[0] for line in text.splitlines() if line.strip().startswith("vqa-")]
    assert ids[0] == "vqa-000000" and ids[1] == "vqa-000004" and ids[-2:] == ["vqa-000006", "vqa-000007"]
    assert "odedit show" in text and "EDIT_ID shows one of them" in " ".join(text.split())


def test_an_unknown_edit_and_an_unfinished_run_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="EDIT_ID: .* has no edit 'vqa-00004'; it has vqa-00000"):
        commands.show(str(workspace.out), "vqa-00004")
    with pytest.raises(InputError, match="RUN '.*': there is no run; expected the folder"):
        commands.show(str(tmp_path), None)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="its run is not finished"):
        commands.report(str(tmp_path), None)


def test_reports_of_a_run_and_of_all_runs_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write_run(tmp_path / name, 5) for name in ("first", "second"))
    commands.report(str(first.out), None)
    page = Path(first.report)
    assert capsys.readouterr().out.strip() == str(page) and "paired t-test" not in page.read_text()
    commands.report(str(tmp_path), str(first.out))
    assert capsys.readouterr().out.split() == [str(first.report), str(second.report)]
    assert "this run minus first" in Path(second.report).read_text() and "paired t-test" not in page.read_text()
