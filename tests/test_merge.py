"""`odedit merge`: the edited model as a plain checkpoint."""

from __future__ import annotations

import dataclasses

import torch
from made_up import TEMPLATE, make_request
from typer.testing import CliRunner

from odedit import Objective, ObjectiveConfig, Stopping, edit, encode_requests, evaluate, load_backbone, load_editor
from odedit.__main__ import app
from odedit.checkpoint import EditInfo, save_edit


def saved(backbone, name, settings, path):
    """One edit in a file; returns its editor, its parameters and the batch that judges it."""
    editor = load_editor(name, settings)
    supervision, evaluation = encode_requests(backbone, [make_request(0)], TEMPLATE)
    objective = Objective(ObjectiveConfig(name="native"))
    (result,) = edit(backbone, editor, objective, supervision, Stopping(40, worst_token_nll=0.1))
    info = EditInfo(
        "edit-0", name, dataclasses.asdict(editor.config), "blip2", "embedded", backbone.fingerprint, "mmedit"
    )
    save_edit(path, result.params, info)
    return editor, result.params, evaluation


def test_the_merged_checkpoint_answers_as_the_edited_model(backbone, tmp_path):
    editor, params, evaluation = saved(backbone, "ftl", {"learning_rate": 2e-3}, tmp_path / "e.safetensors")
    arguments = ["merge", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    merged = load_backbone("blip2", str(tmp_path / "merged"))
    untouched = {name: torch.zeros_like(value) for name, value in params.items()}
    (expected,) = evaluate(backbone, editor, params, evaluation)
    (row,) = evaluate(merged, editor, untouched, evaluation)
    # The whole answer, which runs on: this edit teaches a model to say what it never said, and not to end there.
    assert row["answer_before"] == expected["answer_after"] and row["answer_before"].startswith("anna hill")
    assert row["rel_before"] == expected["rel"] == expected["rel_generated"] == 1.0

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "is there already" in again.output


def test_edits_that_route_cannot_be_merged(backbone, tmp_path):
    saved(backbone, "wise", {"site": "layers.2.ffn.in"}, tmp_path / "e.safetensors")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "merged")])
    assert result.exit_code == 2
    assert "cannot be merged into plain weights" in result.output
    assert not (tmp_path / "merged").exists()
