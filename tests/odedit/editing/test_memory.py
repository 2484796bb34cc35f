"""Memory by formula, against the measured peak of the inner loop."""

from __future__ import annotations

import pytest
import torch

from odedit import Objective, ObjectiveConfig, Stopping, edit, load_backbone, load_editor
from odedit.backbones import encode_requests, inspect_backbone
from odedit.editing.memory import in_gib, needed
from odedit.runtime.peak_memory import peak_memory
from tests.support import tiny_current
from tests.support.requests import TEMPLATE, make_request

MODELS = ("embedded", "llava")
CASES = [
    ("ftl", "native", 4), ("lora", "native", 4), ("lora", "odedit", 1), ("wise", "native", 4), ("wise", "odedit", 1),
    ("tpatcher", "native", 4),
]  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The embedded BLIP-2, and a LLaVA of five million weights in the text model."""
    if request.param == "embedded":
        return load_backbone("blip2", "embedded")
    text = {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }  # fmt: skip
    return load_backbone("auto", str(tiny_current.write("llava", tmp_path_factory.mktemp("model"), text=text)))


@pytest.mark.parametrize(("name", "objective", "edits"), CASES)
def test_the_formula_is_within_a_third_of_the_measured_peak(model, name, objective, edits):
    editor = load_editor(name)
    editor = load_editor(name, dict(editor.fitted(model)))
    config = ObjectiveConfig(objective, **({} if objective == "native" else {"sigma2_0": 1.0}))
    batch = encode_requests(model, [make_request(number) for number in range(edits)], TEMPLATE, editor.sites)[0]
    need = needed(
        model, editor, config, edits=edits, positions=batch.tokens_EKS.shape[2], tokens=batch.target_EKT.shape[2]
    )
    with peak_memory("cpu") as peak:
        edit(model, editor, Objective(config), batch, Stopping(max_steps=3))
    counted = need.edits + need.activations
    print(f"{name}, {objective}: measured {in_gib(peak.bytes)}, formula {in_gib(counted)}")
    assert 2 / 3 < peak.bytes / counted < 4 / 3


def test_weights_are_counted_once_in_the_type_in_which_they_are_loaded(tmp_path):
    folder = str(tiny_current.write("llava", tmp_path))
    empty, loaded = inspect_backbone("auto", folder, dtype="bfloat16"), load_backbone("auto", folder, dtype="bfloat16")
    needs = [
        needed(model, load_editor("ftl"), ObjectiveConfig("native"), edits=2, positions=30, tokens=3)
        for model in (empty, loaded)
    ]
    assert needs[0] == needs[1]
    assert needs[0].model == sum(value.numel() * 2 for value in loaded.model.parameters())
    assert str(needs[0]).startswith(f"{in_gib(needs[0].total)}: model ")
    weights = sum(loaded.site(site).weight.numel() for site in ("layers.-1.ffn.in", "layers.-1.ffn.out"))
    assert needs[0].edits >= 2 * 4 * 5 * weights and loaded.model.dtype == torch.bfloat16
