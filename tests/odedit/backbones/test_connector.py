"""Edits between image tower and text model: the suffix runs the connector, one row per sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from odedit import EditRequest, InputError, Probe
from odedit.backbones import encode_requests
from odedit.editors.common.hooks import rewritten
from tests.support.requests import TEMPLATE, make_request

PROJECTION = "connector.language_projection"


@pytest.fixture(scope="module")
def requests():
    return [make_request(number, full=number != 1) for number in range(3)]


@pytest.fixture(scope="module")
def encoded(backbone, requests):
    """A supervision batch with features after and before the connector."""
    after, _ = encode_requests(backbone, requests, TEMPLATE, ("layers.0.ffn.in",))
    before, _ = encode_requests(backbone, requests, TEMPLATE, (PROJECTION, "layers.3.ffn.in"))
    return after, before


def final_states(backbone, batch, *sites):
    with torch.no_grad():
        return backbone.suffix(backbone.prefix(batch, *sites))


def test_the_connector_in_the_suffix_equals_that_in_the_encoding(backbone, encoded):
    after, before = encoded
    assert before.before_connector and not after.before_connector
    expected = final_states(backbone, after, "layers.2.ffn.in")
    real = after.real_EKS
    first = backbone.connector_sites()[0]
    for sites in ((PROJECTION,), ("layers.2.ffn.in",), ("layers.1.attention.q", first)):
        states = final_states(backbone, before, *sites)
        torch.testing.assert_close(states[real], expected[real], rtol=1e-5, atol=1e-5)


def test_every_site_of_the_connector_sees_one_row_per_sequence(backbone, encoded):
    _, before = encoded
    num_edits, num_slots = before.present_EK.shape
    seen = {}
    rewrites = {
        backbone.site(name): lambda x, y, name=name: seen.__setitem__(name, x.shape) or y
        for name in backbone.connector_sites()
    }
    with rewritten(rewrites):
        final_states(backbone, before, *backbone.connector_sites())
    assert set(seen) == set(backbone.connector_sites())
    assert all(shape[0] == num_edits * num_slots for shape in seen.values())


@pytest.mark.parametrize("site", ["first", "last"])
def test_an_edit_of_the_connector_is_the_model_with_other_weights(backbone, encoded, requests, site):
    """One edit has a changed matrix; its sequences equal those of the library's model with that matrix."""
    _, before = encoded
    name = backbone.connector_sites()[0 if site == "first" else -1]
    linear = backbone.site(name)
    delta = 0.3 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1))
    num_edits, changed = before.num_edits, 2

    def rewrite(x, y):
        change = x.reshape(num_edits, -1, x.shape[-1]) @ delta.T
        mask = (torch.arange(num_edits) == changed)[:, None, None]
        return y + (change * mask).reshape(y.shape)

    unedited = final_states(backbone, before, name)
    with rewritten({linear: rewrite}):
        logits = backbone.head(final_states(backbone, before, name))
    assert torch.equal(logits[:changed], backbone.head(unedited)[:changed])

    kept = linear.weight.data
    linear.weight.data = kept + delta
    try:
        for k, slot in enumerate(before.slots):
            probe = requests[changed].edit if slot == "edit" else requests[changed].supervision[slot]
            length = int(before.real_EKS[changed, k].sum())
            ids = before.tokens_EKS[changed, k, :length][None]
            with torch.no_grad():
                if probe.picture is None:
                    expected = backbone.model.language_model(input_ids=ids).logits
                else:
                    pixels = torch.from_numpy(backbone.processor.process(probe.picture).pixels)[None]
                    expected = backbone.model(pixel_values=pixels, input_ids=ids).logits
            torch.testing.assert_close(logits[changed, k, :length], expected[0], rtol=1e-4, atol=2e-5)
    finally:
        linear.weight.data = kept


def test_the_gradient_reaches_the_connector_of_the_sequences_with_a_picture(backbone, encoded):
    _, before = encoded
    delta = torch.zeros(before.num_edits, *backbone.site(PROJECTION).weight.shape, requires_grad=True)

    def rewrite(x, y):
        return y + torch.bmm(x.reshape(len(delta), -1, x.shape[-1]), delta.transpose(1, 2)).reshape(y.shape)

    def gradient(slot):
        with rewritten({backbone.site(PROJECTION): rewrite}):
            states = backbone.suffix(backbone.prefix(before, PROJECTION))
        return torch.autograd.grad(states[:, before.slots.index(slot)].square().sum(), delta)[0]

    assert gradient("edit").flatten(1).norm(dim=1).min() > 0
    assert not gradient("text_locality").any(), "a prompt without picture does not pass the connector"


def test_text_alone_runs_too(backbone):
    """A batch without pictures: the connector runs on zeros, and its output is unused."""
    request = EditRequest("text", Probe("what is the capital of arland?", "rome"))
    before, _ = encode_requests(backbone, [request], TEMPLATE, (PROJECTION,))
    after, _ = encode_requests(backbone, [request], TEMPLATE)
    states = final_states(backbone, before, PROJECTION)
    assert torch.equal(states[:, 0], final_states(backbone, after, "layers.0.attention.q")[:, 0])


def test_a_spoiled_picture_spoils_its_own_edit_only(backbone, encoded):
    _, before = encoded
    clean = final_states(backbone, before, PROJECTION)
    features = before.features_NLD.clone()
    features[before.picture_EK[2, 0]] = torch.nan
    spoiled = final_states(backbone, replace(before, features_NLD=features), PROJECTION)
    assert spoiled[2, 0].isnan().any()
    assert torch.equal(spoiled[:2], clean[:2])


def test_what_cannot_be_edited_is_named(backbone, encoded):
    after, _ = encoded
    with pytest.raises(ValueError, match=r"encode it with sites=editor\.sites"):
        backbone.prefix(after, PROJECTION)
    with pytest.raises(InputError, match=r"Did you mean 'connector\.language_projection'\?"):
        backbone.site("connector.language_projektion")
    with pytest.raises(InputError, match="feeds no activation"):
        backbone.activation(PROJECTION)
