"""The objective on the embedded model: scale gradients against autograd, and the sequences each setting reads."""

from __future__ import annotations

import pytest
import torch

from odedit import Objective, ObjectiveConfig, calibrate, load_editor
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, SUPERVISION_SLOTS
from odedit.runtime.gather import gather_positions
from tests.support.limits import set_limits
from tests.support.requests import TEMPLATE


@pytest.fixture(scope="module")
def forward(backbone, batches):
    """Final states of an edited model, and those of the unedited model at the answer positions."""
    supervision, _ = batches
    editor = load_editor("ftl")
    generator = torch.Generator().manual_seed(1)
    params = {
        name: 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in editor.init(backbone, supervision).items()
    }
    prefix = backbone.prefix(supervision, editor.sites[0])
    with torch.no_grad():
        base = gather_positions(backbone.suffix(prefix), supervision.predict_EKT)
        with editor.applied(backbone, params, supervision) as trace:
            hidden = backbone.suffix(prefix)
    return editor, params, trace, supervision, hidden, base


def terms_at(backbone, forward, config, w=None):
    editor, params, trace, batch, hidden, base = forward
    if w is not None:
        hidden = hidden * w.reshape(-1, 1, 1, 1)
    objective = Objective(config, sigma2_0=50.0)
    return objective(
        backbone,
        editor,
        params,
        trace,
        batch,
        read_states(objective, batch, hidden),
        objective.unedited(backbone, batch, base),
    )


def read_states(objective, batch, hidden):
    read = objective.read(batch)
    return hidden if read is None else gather_positions(hidden, read)


@pytest.mark.parametrize("direction", ["edited_first", "base_first"])
@pytest.mark.parametrize("kernel", ["rbf", "linear", "contrastive"])
@pytest.mark.parametrize("rephrases", ["single", "multiple"])
def test_scale_gradients_equal_autograd_through_the_final_state(backbone, forward, direction, kernel, rephrases):
    config = ObjectiveConfig(locality_direction=direction, kernel=kernel, rephrases=rephrases)
    w = torch.ones(8, requires_grad=True)
    terms = terms_at(backbone, forward, config, w)
    for name in ("rel", "loc", "gen"):
        if not terms.risks[name].requires_grad:
            assert not terms.scale_gradients[name].any()
            continue
        (expected,) = torch.autograd.grad(terms.risks[name].sum(), w, retain_graph=True)
        torch.testing.assert_close(terms.scale_gradients[name], expected, rtol=1e-3, atol=1e-4)
    total = sum(gradient.abs() for gradient in terms.scale_gradients.values())
    torch.testing.assert_close(terms.penalty, total.square())


def test_prompt_environments_have_one_likelihood_per_rephrase(backbone, forward):
    terms = terms_at(backbone, forward, ObjectiveConfig(environments="prompts"))
    assert set(terms.scale_gradients) == {"rel", "loc", "text_rephrase", "image_rephrase"}
    # Request 5 has no image rephrase: an absent environment counts 0.
    assert terms.scale_gradients["image_rephrase"][5] == 0
    assert terms.scale_gradients["image_rephrase"][0] != 0


def test_weights_scale_their_term_only(backbone, forward):
    plain = terms_at(backbone, forward, ObjectiveConfig())
    weighted = terms_at(
        backbone, forward, ObjectiveConfig(reliability_weight=2.0, locality_weight=3.0, generality_weight=0.0)
    )
    torch.testing.assert_close(weighted.total, 2 * plain.risks["rel"] + 3 * plain.risks["loc"])
    torch.testing.assert_close(plain.total, plain.risks["rel"] + plain.risks["loc"] + plain.risks["gen"])
    assert set(plain.scale_gradients) == {"rel", "loc", "gen"}
    # A risk of weight 0 is no environment of the penalty.
    assert set(weighted.scale_gradients) == {"rel", "loc"}


def test_more_tokens_than_fit_at_once_have_the_same_risk_and_gradient(backbone, forward, monkeypatch):
    w = torch.ones(8, requires_grad=True)
    at_once = terms_at(backbone, forward, ObjectiveConfig(), w)
    monkeypatch.setattr("odedit.objectives.base._TOKENS_KEPT", 3)
    set_limits(monkeypatch, objective_logits=3 * backbone.vocabulary_size)
    in_parts = terms_at(backbone, forward, ObjectiveConfig(), w)
    torch.testing.assert_close(in_parts.risks["loc"], at_once.risks["loc"])
    for read in (lambda terms: terms.risks["loc"], lambda terms: terms.penalty):
        gradients = [torch.autograd.grad(read(terms).sum(), w, retain_graph=True)[0] for terms in (in_parts, at_once)]
        assert gradients[0].any()
        torch.testing.assert_close(*gradients)


def test_absent_sequences_count_for_nothing(backbone, forward):
    """Locality is the mean over the prompts that an edit has, not over all slots."""
    editor, params, trace, batch, hidden, base = forward
    only_text = batch.select((EDIT, "text_rephrase", "text_locality"))
    keep = [batch.slots.index(slot) for slot in only_text.slots]
    objective = Objective(ObjectiveConfig(), sigma2_0=50.0)
    hidden = gather_positions(hidden, batch.predict_EKT)
    unedited = objective.unedited(backbone, only_text, base[:, keep])
    reduced = objective(backbone, editor, params, trace, only_text, hidden[:, keep], unedited)
    full = objective(backbone, editor, params, trace, batch, hidden, objective.unedited(backbone, batch, base))
    for name in ("rel", "loc", "gen"):
        torch.testing.assert_close(reduced.risks[name][5], full.risks[name][5])
    assert not torch.allclose(reduced.risks["loc"][0], full.risks["loc"][0])


def test_unedited_states_have_no_divergence(backbone, forward):
    editor, params, trace, batch, _, base = forward
    with torch.no_grad():
        hidden = backbone.suffix(backbone.prefix(batch, editor.sites[0]), batch.predict_EKT)
    objective = Objective(ObjectiveConfig(), sigma2_0=50.0)
    terms = objective(backbone, editor, params, trace, batch, hidden, objective.unedited(backbone, batch, base))
    assert terms.risks["loc"].abs().max() < 1e-6
    assert terms.risks["gen"].min() > 0


def test_text_positions_compare_more_states_than_target_positions(backbone, forward):
    target = terms_at(backbone, forward, ObjectiveConfig(positions="target"))
    text = terms_at(backbone, forward, ObjectiveConfig(positions="text"))
    assert not torch.allclose(target.risks["gen"], text.risks["gen"])
    torch.testing.assert_close(target.risks["rel"], text.risks["rel"])


def test_native_reads_only_what_its_editor_needs(backbone, batches):
    supervision, _ = batches
    native = Objective(ObjectiveConfig(name="native"))
    assert native.slots(load_editor("ftl"), supervision) == (EDIT,)
    assert native.slots(load_editor("wise", {"site": "layers.2.ffn.in"}), supervision) == (EDIT, *LOCALITY_SLOTS)
    assert Objective(ObjectiveConfig(), 1.0).slots(load_editor("ftl"), supervision) == SUPERVISION_SLOTS


def test_worst_token_is_the_least_likely_one(backbone, forward):
    _, _, _, batch, hidden, _ = forward
    terms = terms_at(backbone, forward, ObjectiveConfig())
    for e in range(batch.num_edits):
        mask = batch.target_mask_EKT[e, 0]
        logits = backbone.head(hidden[e, 0, batch.predict_EKT[e, 0][mask]])
        nll = torch.nn.functional.cross_entropy(logits, batch.target_EKT[e, 0][mask], reduction="none")
        assert terms.worst_nll[e] == pytest.approx(float(nll.max()), rel=1e-4)
        assert terms.risks["rel"][e] == pytest.approx(float(nll.mean()), rel=1e-4)
        assert bool(terms.all_right[e]) == bool((logits.argmax(-1) == batch.target_EKT[e, 0][mask]).all())


def test_bandwidth_is_measured_on_unedited_states(backbone, requests_8):
    measured = calibrate(backbone, requests_8, TEMPLATE)
    assert measured > 0
    assert calibrate(backbone, requests_8, TEMPLATE) == measured
    assert calibrate(backbone, requests_8, TEMPLATE, positions="text") != measured
    with pytest.raises(ValueError, match="sigma2_0 is not set"):
        Objective(ObjectiveConfig())


def test_native_with_kl_is_the_native_loss_and_the_locality_risk(backbone, batches):
    supervision, _ = batches
    editor = load_editor("wise", {"site": "layers.2.ffn.in"})
    terms = {}
    for name in ("native", "native_kl"):
        objective = Objective(ObjectiveConfig(name=name, locality_weight=2.0))
        batch = supervision.select(objective.slots(editor, supervision))
        prefix = backbone.prefix(batch, *editor.sites)
        base = gather_positions(backbone.suffix(prefix), batch.predict_EKT)
        live = editor.init(backbone, batch)["side_live"].shape
        side = {"side_live": 0.05 * torch.randn(live, generator=torch.Generator().manual_seed(0))}
        with editor.applied(backbone, side, batch) as trace:
            hidden = backbone.suffix(prefix, batch.predict_EKT)
        terms[name] = objective(backbone, editor, side, trace, batch, hidden, objective.unedited(backbone, batch, base))
    native, with_kl = terms["native"], terms["native_kl"]
    assert bool((with_kl.risks["loc"] > 0).any()) and not native.risks["loc"].any()
    torch.testing.assert_close(with_kl.total, native.total + 2.0 * with_kl.risks["loc"])
    assert not with_kl.penalty.any()
