"""The example of `odedit/objectives/README.md` is a complete objective."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import odedit
from odedit import Objective, ObjectiveConfig, Stopping, edit, encode_requests, load_editor, objectives
from tests.support.requests import TEMPLATE, make_request

README = Path(odedit.__file__).parent / "objectives" / "README.md"


def test_the_example_edits_and_lowers_both_likelihoods(backbone, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "readme_example").mkdir()
    (tmp_path / "readme_example" / "__init__.py").touch()
    (tmp_path / "readme_example" / "likelihood.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    name = "readme_example.likelihood"
    try:
        objective = Objective(ObjectiveConfig(name))
    finally:
        for module in ("readme_example", name):
            sys.modules.pop(module, None)
    assert objective.config.name == name
    editor = load_editor("ftl", {"learning_rate": 3e-3})
    supervision, _ = encode_requests(backbone, [make_request(number) for number in range(2)], TEMPLATE)
    assert objective.slots(editor, supervision) == ("edit", "text_rephrase")
    for result in edit(backbone, editor, objective, supervision, Stopping(5, 1e-9)):
        curves = {term: torch.tensor(result.curves[term]) for term in ("rel", "gen", "objective")}
        torch.testing.assert_close(curves["objective"], curves["rel"] + curves["gen"])
        assert curves["rel"][-1] < curves["rel"][0] and curves["gen"][-1] < curves["gen"][0]


def test_every_objective_is_described():
    text = README.read_text(encoding="utf-8")
    assert all(f"| `{name}`" in text for name in objectives.names())
