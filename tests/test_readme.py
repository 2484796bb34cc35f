"""All pages: their links and paths lead somewhere, their commands exist and run, their examples work."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from odedit.__main__ import app
from odedit.data.fields import problem_of_fields, task_of
from pipeline.config import run as config
from tests.support import inline_pipeline
from tests.support.command_line import wrong_in
from tests.support.mmedit_files import picture, record, write_array, write_images
from tests.support.paths import ROOT

FOLDERS = ("odedit", "pipeline", "tune", "cluster", "tests")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md")))
}
README = PAGES["README.md"]
TESTED_ELSEWHERE = {
    r"odedit .*s3://": "tests/pipeline/driver/test_runs_in_storage.py",
    r"odedit compare studies/|odedit compare --uri": "tests/pipeline/report/test_compare.py",
    r"odedit commit .*(sequential|runs/sequence)": "tests/pipeline/driver/test_commit_in_sequence.py",
    r"odedit commit .*(--change|--from|routed|bulk)": "tests/pipeline/driver/test_commit.py",
    r"odedit data pack": "tests/test_cli.py",
    r"odedit mlflow sync|odedit fetch": "tests/pipeline/tracking/test_tracking.py",
    r"odedit report|odedit show": "tests/pipeline/edits/test_show.py",
    r"odedit edits": "tests/pipeline/edits/test_committed.py",
    r"odedit study (?!list)": "tests/pipeline/study/test_study.py",
    r"odedit submit": "tests/cluster/test_two_nodes.py",
    r"odedit tune": "tests/tune/test_search.py",
    r"odedit world": "tests/odedit/world/test_world.py",
}
"""Commands that need a server, a cluster or minutes, and the test of each."""
ADDED = {
    "odedit commit": ["commit.steps=2", "commit.copies=1", "pipeline.actors=1"],
    "odedit commit data.path": ["backbone.checkpoint=embedded", "tracking.enabled=false", "evaluation.generate=false"],
    "odedit commit --preset": ["backbone.checkpoint=embedded", "tracking.enabled=false", "evaluation.generate=false"],
    "odedit train mend": ["editor.training_steps=2", "editor.validate_every=2", "editor.batch_size=2"],
    "odedit edit --config run.yaml data.path=records.json": ["out=runs/records"],
}
"""Settings that are added to a command shown, so that it takes seconds or writes to a folder of its own."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    """Each `odedit` command shown on a page, once, without the comment behind it."""
    lines = [line for text in PAGES.values() for line in re.findall(r"^ {4}(odedit .*)$", text, flags=re.MULTILINE)]
    return list(dict.fromkeys(line.split("  #")[0].split("   ")[0].strip() for line in lines))


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str) -> Iterator[str]:
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            yield link


def missing_paths(text: str) -> Iterator[str]:
    """Paths below one of the project's folders, between backticks, that are not there."""
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text):
        if not (ROOT / path).exists():
            yield path


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    assert list(broken_links(page, PAGES[page])) == []
    assert list(missing_paths(PAGES[page])) == []


def test_a_link_and_a_path_that_lead_nowhere_are_noticed() -> None:
    text = "# A `b` c\n[x](#a-b-c) [y](#a-b) [z](none.md) [w](https://none) `odedit/none.py` `odedit/data/`"
    assert list(broken_links("README.md", "[y](#quick) [z](none.md) [s](pipeline/SETTINGS.md)")) == [
        "#quick",
        "none.md",
    ]
    assert anchors(text) == {"a-b-c"} and list(missing_paths(text)) == ["odedit/none.py"]


def test_modules_and_targets_shown_are_there() -> None:
    text = "\n".join(PAGES.values())
    for name in {*re.findall(r"python -m ((?:odedit|pipeline|tune|tests)[\w.]*\w)", text)}:
        assert importlib.util.find_spec(name), name
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {*re.findall(r"(?:^ {4}|`)make ([a-z]+)", text, flags=re.MULTILINE)} <= {*targets}


def test_a_dozen_lines_of_python_edit_a_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(README, "python")
    assert len(ast.parse(code).body) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    (row,) = ast.literal_eval(capsys.readouterr().out)
    assert row["rel"] == 1.0
    assert row["rel_before"] < 1.0
    assert row["t_gen"] == 1.0
    assert (row["answer_before"], row["answer_after"]) == ("Boris Frost", "Anna Frost")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(PAGES[page], "python")])
def test_modules_shown_can_be_imported(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, code in enumerate(blocks(PAGES[page], "python")):
        name = f"shown_{number}"
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)


def test_the_records_shown_can_be_used() -> None:
    shown = [json.loads(block) for text in PAGES.values() for block in blocks(text, "json")]
    assert shown
    for fields in shown:
        assert problem_of_fields(fields, task_of(fields, "auto")) == ""


def test_the_configuration_shown_is_a_valid_one() -> None:
    (text,) = blocks(README, "yaml")
    run = config.from_dict(yaml.safe_load(text))
    assert (run.out, run.backbone.dtype, run.data.image_root) == ("runs/first", "bfloat16", "/data/coco")


@pytest.mark.parametrize("command", commands())
def test_a_command_shown_exists_with_its_options(command: str) -> None:
    assert wrong_in(shlex.split(command)[1:]) == ""


@pytest.mark.parametrize("command", ["world buld", "aply runs", "world", "edit --confg run.yaml"])
def test_a_command_or_option_that_is_not_there_is_noticed(command: str) -> None:
    assert wrong_in(command.split())


def reader(folder: Path) -> None:
    """Writes what a reader of the pages has: `run.yaml` with a small model, records, and their pictures."""
    records = [record(number) for number in range(10)]
    _, rephrase_root = write_images(folder, records)
    for name, part in (("vqa_eval", records[:2]), ("vqa_train", records[2:8]), ("vqa_validation", records[8:])):
        write_array(rephrase_root / f"{name}.json", part)
    write_array(folder / "records.json", records[:2])
    (folder / "pictures").mkdir()
    for number in (1, 2):
        picture(number).save(folder / "pictures" / f"{number}.jpg")
    picture().save(folder / "seven.png")
    (text,) = blocks(README, "yaml")
    values = yaml.safe_load(local(text, folder))
    values["backbone"] = {"checkpoint": "embedded"}
    small = {
        "stopping": {"max_steps": 2},
        "evaluation": {"generate": False, "mmedit": False},
        "tracking": {"enabled": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values | small), encoding="utf-8")


def local(text: str, folder: Path) -> str:
    return text.replace("/data/coco", str(folder / "coco")).replace("/data/mmedit", str(folder / "rephrased"))


def test_the_commands_shown_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader(tmp_path)
    monkeypatch.chdir(tmp_path)
    inline_pipeline.install(monkeypatch)
    run = 0
    for command in commands():
        if any(re.match(pattern, command) for pattern in TESTED_ELSEWHERE):
            continue
        command, _, target = command.partition(" > ")
        words = shlex.split(local(command, tmp_path))[1:]
        words += [word for start, more in ADDED.items() if command.startswith(start) for word in more]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
        if target:
            (tmp_path / target).write_text(done.stdout)
        run += 1
    assert run >= 10
    merged = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors"} <= merged


def test_commands_that_are_not_run_here_have_a_test() -> None:
    shown = commands()
    for pattern, path in TESTED_ELSEWHERE.items():
        assert (ROOT / path).is_file() and any(re.match(pattern, command) for command in shown), pattern
