"""Neurons in a wider feed-forward network: the copy of the checkpoint computes what the editor adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from odedit import Objective, ObjectiveConfig, Stopping, edit, encode_requests, load_backbone, load_editor, stack_params
from odedit.editing.widened import can_widen, export_widened
from odedit.errors import InputError
from tests.support import tiny_models
from tests.support.requests import TEMPLATE


@pytest.mark.parametrize("layer", [-1, 1])
def test_a_checkpoint_with_wider_networks_computes_the_neurons(backbone, requests_8, tmp_path: Path, layer) -> None:
    editor = load_editor("tpatcher", {"layer": layer, "learning_rate": 0.03})
    supervision, evaluation = encode_requests(backbone, requests_8[:3], TEMPLATE)
    native = Objective(ObjectiveConfig(name="native"))
    params = stack_params([each.params for each in edit(backbone, editor, native, supervision, Stopping(20))])
    assert can_widen(backbone)
    neurons = editor.neurons(backbone, params)
    export_widened(backbone, neurons, tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["text_config"]["ffn_dim"] == 512 + len(neurons.biases_N)
    wide = load_backbone("blip2", str(tmp_path / "wide"))
    with torch.no_grad():
        prefix = backbone.prefix(evaluation, *editor.sites)
        unedited = backbone.suffix(prefix, evaluation.predict_EKT)
        with editor.together(backbone, params, evaluation):
            expected = backbone.suffix(prefix, evaluation.predict_EKT)
        computed = wide.suffix(wide.prefix(evaluation, "layers.0.ffn.in"), evaluation.predict_EKT)
    change = (expected - unedited).abs().mean()
    # The checkpoint is stored in half precision.
    assert change > 0.01 and (computed - expected).abs().mean() < 0.02 * change
    with pytest.raises(InputError, match="wide"):
        export_widened(backbone, neurons, tmp_path / "wide")


def test_a_gated_network_takes_no_further_units(tmp_path: Path) -> None:
    assert not can_widen(load_backbone("llava", str(tiny_models.write("llava", tmp_path / "llava"))))
