"""The demo in this process: its records, its models beside each other, and the command that it prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from odedit.__main__ import app
from pipeline import demo
from pipeline.config.run import RunConfig
from pipeline.run_folder.committed import read_edits
from pipeline.run_folder.rows import parts, read_rows
from pipeline.run_folder.workspace import Workspace
from tests.support import inline_pipeline

EDITS = 3


@pytest.fixture
def quick(worlds: dict[int, dict[str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with few steps, a small pool, and a benchmark that is written already."""
    inline_pipeline.install(monkeypatch)

    def linked(folder: Path, seed: int = 0) -> None:
        if not Path(folder).exists():
            shutil.copytree(worlds[seed]["images"].parent, folder, copy_function=os.link)

    monkeypatch.setattr(demo, "build_embedded", linked)
    original, section_of = demo.arm_config, demo.records_section

    def few_steps(*arguments: Any) -> RunConfig:
        config = original(*arguments)
        if config.commit is not None:
            settings = {"steps": 60, "copies": 1, "candidates": 4} if config.commit_way == "joint" else {}
            config = replace(
                config, commit=replace(config.commit, settings=replace(config.commit.settings, **settings))
            )
        return replace(config, stopping=replace(config.stopping, max_steps=2 if config.commit is None else 60))

    def small_pool(out: Path) -> dict[str, Any]:
        section = section_of(out)
        pool = out / "pool.json"
        if not pool.exists():  # a run that is resumed has the same input files
            pool.write_text(json.dumps(json.loads(Path(section["pool"]).read_text())[:24]))
        return section | {"pool": str(pool)}

    monkeypatch.setattr(demo, "arm_config", few_steps)
    monkeypatch.setattr(demo, "records_section", small_pool)


def test_the_demo_ends_with_one_model_of_its_facts_and_a_command_that_asks_it(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(demo, "open_page", opened.append)
    arguments = ["demo", "--out", str(tmp_path / "demo"), "--edits", str(EDITS)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    report = tmp_path / "demo" / "report.html"
    assert opened == [str(report)] and f"Report:  {report}" in result.stdout
    pages = re.findall(r'<a href="([\w-]+/report.html)">', report.read_text())
    assert [str(tmp_path / "demo" / page) for page in pages[: len(demo.MODELS)]] == re.findall(
        r"^ {9}(\S+) \(one model, ", result.stdout, re.MULTILINE
    )
    assert len(pages) == 7 and all((tmp_path / "demo" / page).is_file() for page in pages)
    again = CliRunner().invoke(app, [*arguments, "--no-open"])
    assert again.exit_code == 0 and len(opened) == 1, again.output
    folders = [tmp_path / "demo" / name.removeprefix("demo-") for name in (*demo.ARMS.values(), *demo.MODELS.values())]
    of_arms = [
        [row["edit_id"] for row in read_rows(parts(Workspace.of(folder))) if row["status"] == "edited"]
        for folder in folders
    ]
    assert of_arms == [of_arms[0]] * 7 and len(of_arms[0]) == EDITS
    first, second, *_ = result.stdout.splitlines()
    assert first.startswith("WISE + ODEdit against WISE: m_gen") and second.startswith("WISE + contrast against WISE: ")
    assert "is due to the rephrase (WISE + rephrase against WISE) and" in first and "; m_loc_near" in first
    models = folders[len(demo.ARMS) :]
    head, _ = report.read_text().split("Single edits, one per record", 1)
    assert f"<h1>One model of {EDITS} facts, by way</h1>" in head
    for name, folder in zip(demo.MODELS, models, strict=True):
        edits = read_edits(Workspace.of(folder).model)
        held = f"{sum(edit['holds'] for edit in edits)} of {EDITS}"
        assert re.search(rf"{name} .*{held}", result.stdout)
        assert f'<th scope="row">{name}</th><td class="number">{held}</td>' in head
        kept = json.loads((folder / "summary.json").read_text())["kept"]
        assert f"{kept['mean']:.3f}".removeprefix("0") in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "load_edited" in line]
    _, option, program = shlex.split(line)
    assert option == "-c"
    edits = read_edits(Workspace.of(models[0]).model)
    asked = next((edit for edit in edits if edit["holds"]), edits[0])
    assert f"it answers {asked['answer_after']!r} instead of {asked['answer_before']!r}" in result.stdout
    capsys.readouterr()
    exec(compile(program, "demo", "exec"), {})
    assert capsys.readouterr().out.strip() == asked["answer_after"]


def test_the_demos_facts_are_different_ones(
    worlds: dict[int, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "build_embedded", lambda folder: folder.symlink_to(worlds[0]["images"].parent))
    section = demo.records_section(tmp_path)
    records = json.loads(Path(section["path"]).read_text())
    assert all((Path(section["image_root"]) / record["image"]).is_file() for record in records)
    assert len({record["fact"] for record in records[:48]}) == 48
    assert len(records) == 288 and len({record["fact"] for record in records[:96]}) == 96
