"""The examples of the README and of the folder pages work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path for name in ("odedit", "pipeline", "tune", "cluster") for path in (ROOT / name).rglob("*.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_a_dozen_lines_of_python_edit_a_fact(tmp_path, monkeypatch, capsys):
    (code,) = blocks("python")
    assert len(ast.parse(code).body) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    (row,) = ast.literal_eval(capsys.readouterr().out)
    assert row["rel"] == 1.0
    assert row["rel_before"] < 1.0
    assert row["t_gen"] == 1.0
    assert (row["answer_before"], row["answer_after"]) == ("Boris Frost", "Anna Frost")


def test_the_configuration_shown_is_a_valid_one():
    from pipeline.config import run as config

    (text,) = blocks("yaml")
    run = config.from_dict(yaml.safe_load(text))
    assert (run.editor.name, run.objective.name, run.out) == ("wise", "odedit", "runs/wise-odedit")


def test_every_command_shown_exists():
    texts = [README, *(path.read_text(encoding="utf-8") for path in PAGES)]
    shown = set(re.findall(r"^ {4}odedit ([a-z]+(?: [a-z]+)?)(?= |$)", "\n".join(texts), flags=re.MULTILINE))
    assert len(shown) >= 6
    for command in sorted(shown):
        assert is_command(command.split()), command


def is_command(words: list[str]) -> bool:
    """True if the words name a command. Words after a command without subcommands are its arguments."""
    import typer

    from odedit.__main__ import app

    command = typer.main.get_command(app)
    for word in words:
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            return True
        if word not in subcommands:
            return False
        command = subcommands[word]
    return not hasattr(command, "commands")


def test_a_command_that_is_not_there_is_noticed():
    assert is_command(["world", "build"]) and is_command(["apply", "runs"])
    for words in (["world", "buld"], ["aply", "runs"], ["world"]):
        assert not is_command(words), words


@pytest.mark.parametrize(
    "path", ["odedit", "pipeline", "tests", "constraints.txt", "tests/odedit/editors/test_editor_contract.py"]
)
def test_paths_named_in_the_readme_are_there(path):
    assert path in README
    assert (ROOT / path).exists()
