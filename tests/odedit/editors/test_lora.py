"""LoRA against `peft`'s own adapters on the same weights, trained by torch's own optimiser."""

from __future__ import annotations

import peft
import pytest
import torch

from odedit import Objective, ObjectiveConfig, Stopping, edit, encode_requests, load_editor
from tests.support.requests import TEMPLATE, make_request
from tests.support.transformers_forward import copy_of, library_logits, library_nll

SETTINGS = {"rank": 4, "alpha": 12.0, "learning_rate": 1e-2, "weight_decay": 0.1}
PARTS = {"attention.q": "q_proj", "attention.v": "v_proj"}
REQUEST = make_request(0)


def adapted(backbone, params):
    """The library's model with `peft` adapters that start at these factors, and its factors by site."""
    config = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=list(PARTS.values()))
    model = peft.get_peft_model(copy_of(backbone), config)
    factors = {}
    for layer in range(backbone.num_layers):
        for part, name in PARTS.items():
            module = model.base_model.model.get_submodule(
                f"language_model.model.decoder.layers.{layer}.self_attn.{name}"
            )
            for factor in ("lora_A", "lora_B"):
                weight = getattr(module, factor)["default"].weight
                weight.data.copy_(params[f"layers.{layer}.{part}.{factor}"][0])
                factors[f"layers.{layer}.{part}.{factor}"] = weight
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(w) for w in factors.values()}
    return model, factors


@pytest.fixture(scope="module")
def encoded(backbone):
    return encode_requests(backbone, [REQUEST], TEMPLATE)


@pytest.fixture(scope="module")
def filled(backbone, encoded):
    """An editor, with factors that are both not zero."""
    editor = load_editor("lora", SETTINGS)
    generator = torch.Generator().manual_seed(0)
    params = editor.init(backbone, encoded[0])
    return editor, {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}


def test_forward_and_merged_weights_equal_peft(backbone, encoded, filled):
    (_, evaluation), (editor, params) = encoded, filled
    model, _ = adapted(backbone, params)
    with torch.no_grad(), editor.applied(backbone, params, evaluation):
        logits = backbone.head(backbone.suffix(backbone.prefix(evaluation, *editor.sites)))
    for k, slot in enumerate(evaluation.slots):
        with torch.no_grad():
            expected = library_logits(model.base_model.model, backbone, evaluation, REQUEST, 0, slot)
        torch.testing.assert_close(logits[0, k][: len(expected)], expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    differences = editor.merged(params)
    assert set(differences) == {f"layers.{n}.{part}" for n in range(backbone.num_layers) for part in PARTS}
    for site, difference in differences.items():
        _, layer, part = site.split(".", 2)
        attention = merged.language_model.model.decoder.layers[int(layer)].self_attn
        expected = getattr(attention, PARTS[part]).weight - backbone.site(site).weight
        torch.testing.assert_close(difference, expected.detach(), rtol=1e-4, atol=1e-5)


def test_steps_equal_peft_under_torch_adamw(backbone, encoded):
    supervision, _ = encoded
    editor = load_editor("lora", SETTINGS)
    native = Objective(ObjectiveConfig(name="native"))
    (result,) = edit(backbone, editor, native, supervision, Stopping(max_steps=3))
    model, factors = adapted(backbone, editor.init(backbone, supervision))
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        loss = library_nll(model.base_model.model, backbone, supervision, REQUEST, 0)
        assert result.curves["rel"][step] == pytest.approx(loss.item(), rel=2e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, weight in factors.items():
        difference = result.params[name][0] - weight.detach()
        assert difference.norm() < 1e-2 * weight.norm(), name


def test_factors_start_as_peft_starts_them(backbone, encoded):
    """`A` is uniform within 1 / sqrt(in) and `B` is zero: the addition is zero."""
    editor = load_editor("lora", SETTINGS)
    params = editor.init(backbone, encoded[0])
    config = peft.LoraConfig(r=4, target_modules=list(PARTS.values()))
    fresh = peft.get_peft_model(copy_of(backbone), config).state_dict()
    theirs = torch.cat([value.flatten() for name, value in fresh.items() if "lora_A" in name])
    ours = torch.cat([value.flatten() for name, value in params.items() if name.endswith("lora_A")])
    assert len(ours) == len(theirs)
    bound = backbone.hidden_size**-0.5
    for drawn in (ours, theirs):
        assert 0.99 * bound < drawn.abs().max() <= bound
        assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not any(value.any() for name, value in params.items() if name.endswith("lora_B"))


def test_factors_depend_on_edit_site_and_seed_alone(backbone, encoded):
    both, _ = encode_requests(backbone, [make_request(1), REQUEST], TEMPLATE)
    alone = load_editor("lora", SETTINGS).init(backbone, encoded[0])
    batched = load_editor("lora", SETTINGS).init(backbone, both)
    reseeded = load_editor("lora", {**SETTINGS, "seed": 1}).init(backbone, encoded[0])
    for name, value in alone.items():
        assert torch.equal(value[0], batched[name][1])
        if name.endswith("lora_A"):
            assert not torch.equal(value[0], batched[name][0])
            assert not torch.equal(value, reseeded[name])
    assert not torch.equal(alone["layers.0.attention.q.lora_A"], alone["layers.0.attention.v.lora_A"])
    assert not torch.equal(alone["layers.0.attention.q.lora_A"], alone["layers.1.attention.q.lora_A"])
