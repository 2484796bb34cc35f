"""FT-L and FT-V against the library's model, trained by torch's own optimiser."""

from __future__ import annotations

import pytest
import torch

from odedit import InputError, Objective, ObjectiveConfig, Stopping, edit, encode_requests, load_editor, stack_params
from odedit.editors.common.fine_tuning import resolve
from tests.support.requests import TEMPLATE, make_request
from tests.support.transformers_forward import copy_of, library_logits, library_nll

NATIVE = Objective(ObjectiveConfig(name="native"))
REQUESTS = [make_request(0), make_request(1)]


@pytest.mark.parametrize("name", ["ftl", "ftv"])
def test_steps_equal_the_library_model_under_torch_adamw(backbone, name):
    editor = load_editor(name, {"learning_rate": 1e-3})
    supervision, _ = encode_requests(backbone, REQUESTS, TEMPLATE, editor.sites)
    results = edit(backbone, editor, NATIVE, supervision, Stopping(max_steps=3))
    sites = resolve(backbone, editor.sites)
    for e, (request, result) in enumerate(zip(REQUESTS, results, strict=True)):
        model = copy_of(backbone)
        module_of = {module: path for path, module in backbone.model.named_modules()}
        weights = {site: model.get_submodule(module_of[backbone.site(site)]).weight for site in sites}
        optimizer = torch.optim.AdamW([w.requires_grad_() for w in weights.values()], lr=1e-3, weight_decay=0.0)
        for step in range(3):
            loss = library_nll(model, backbone, supervision, request, e)
            assert result.curves["rel"][step] == pytest.approx(loss.item(), rel=2e-3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert set(result.params) == set(sites)
        for site, weight in weights.items():
            expected = weight.detach() - backbone.site(site).weight
            difference = result.params[site][0] - expected
            assert expected.any() and difference.norm() < 1e-2 * expected.norm(), site


def test_ftv_leaves_prompts_without_picture_alone_and_edits_the_others(backbone):
    editor = load_editor("ftv", {"learning_rate": 1e-3})
    supervision, evaluation = encode_requests(backbone, REQUESTS, TEMPLATE, editor.sites)
    params = stack_params([r.params for r in edit(backbone, editor, NATIVE, supervision, Stopping(max_steps=3))])
    with torch.no_grad():
        prefix = backbone.prefix(evaluation, *editor.sites)
        before = backbone.suffix(prefix)
        with editor.applied(backbone, params, evaluation):
            after = backbone.suffix(prefix)
    has_picture = evaluation.picture_EK >= 0
    moved = (after != before).flatten(2).any(dim=2)
    assert torch.equal(moved, has_picture)
    assert not has_picture.all()


def test_edits_together_are_the_library_model_with_the_summed_weights(backbone):
    editor = load_editor("ftv", {"sites": ["connector.language_projection"], "learning_rate": 1e-2})
    supervision, evaluation = encode_requests(backbone, REQUESTS, TEMPLATE, editor.sites)
    params = stack_params([r.params for r in edit(backbone, editor, NATIVE, supervision, Stopping(max_steps=2))])
    assert list(params) == ["connector.language_projection"]
    model = copy_of(backbone)
    model.language_projection.weight.data += params["connector.language_projection"].sum(dim=0)
    with torch.no_grad(), editor.together(backbone, params, evaluation):
        logits = backbone.head(backbone.suffix(backbone.prefix(evaluation, *editor.sites)))
        for e, request in enumerate(REQUESTS):
            for k, slot in enumerate(evaluation.slots):
                expected = library_logits(model, backbone, evaluation, request, e, slot)
                torch.testing.assert_close(logits[e, k][: len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_patterns_of_sites(backbone):
    assert resolve(backbone, ("layers.*.attention.v",)) == [f"layers.{n}.attention.v" for n in range(4)]
    assert tuple(resolve(backbone, ("connector.*",))) == backbone.connector_sites()
    crossing = resolve(backbone, ("connector.qformer.*.crossattention.*",))
    assert 0 < len(crossing) < len(backbone.connector_sites()) and all("crossattention" in name for name in crossing)
    assert load_editor("lora").sites[0] == "layers.0.attention.q"
    for sites, message in (
        (("connector.*", "connector.language_projection"), "expected different matrices"),
        (("connector.nothing.*",), "'connector.nothing.*' fits no site; there are e.g. layers.*.ffn.in and connector."),
        (("layer.*",), "fits no site"),
        (("layers.*.ffn.middle",), "Unknown site 'layers.0.ffn.middle'"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(backbone, sites)


def test_settings_are_checked():
    with pytest.raises(InputError, match="sites: got 'layers.3.ffn.in', expected sites of the connector"):
        load_editor("ftv", {"sites": ("layers.3.ffn.in",)})
    with pytest.raises(InputError, match="sites: got none"):
        load_editor("lora", {"sites": ()})
    with pytest.raises(InputError, match="rank: got 0, expected a whole number >= 1"):
        load_editor("lora", {"rank": 0})
    assert load_editor("ftl", {"sites": "layers.0.ffn.in"}).sites == ("layers.0.ffn.in",)
