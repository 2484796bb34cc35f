"""The contract of objectives: run for those of the package and for one from outside it."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from odedit import (
    InputError,
    Objective,
    ObjectiveConfig,
    Stopping,
    calibrate,
    edit,
    encode_requests,
    load_editor,
    objectives,
)
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, NEAR, REPHRASE_SLOTS, SUPERVISION_SLOTS
from odedit.objectives import base
from odedit.objectives.common.terms import TERMS, Terms
from odedit.runtime.gather import gather_positions
from odedit.training.loop import train
from odedit.training.records import EncodedRequests
from tests.support.limits import set_limits
from tests.support.requests import TEMPLATE, make_pool, make_request

OUTSIDE = "outside.norm"
NAMES = (*objectives.names(), OUTSIDE)
NEGATIVES = 4
WEIGHTS = {"reliability_weight": 2.0, "locality_weight": 0.7, "generality_weight": 0.5, "own_weight": 0.3}


@pytest.fixture(scope="module")
def sigma2_0(backbone, requests_8):
    return calibrate(backbone, requests_8, TEMPLATE)


@pytest.fixture(params=NAMES)
def objective(request, sigma2_0):
    further = {"norm_weight": 0.1} if request.param == OUTSIDE else {}
    config = ObjectiveConfig(request.param, negatives=NEGATIVES, **WEIGHTS, **further)
    return Objective(config, sigma2_0)


@pytest.fixture(scope="module")
def editor():
    """WISE, whose own terms read the record's unrelated prompts."""
    return load_editor("wise", {"site": "layers.2.ffn.in"})


@pytest.fixture(scope="module")
def supervision(backbone, editor, requests_8):
    pool = make_pool(backbone, NEGATIVES, editor.sites)
    return encode_requests(backbone, requests_8, TEMPLATE, editor.sites, pool)[0]


def params_of(backbone, editor, batch):
    """phi_e at some distance from phi_0, moved alike for every edit."""
    start = editor.init(backbone, batch)
    generator = torch.Generator().manual_seed(0)
    moved = {name: 0.02 * torch.randn(value.shape[1:], generator=generator) for name, value in start.items()}
    return {
        name: (value + moved[name]).requires_grad_() if name not in editor.frozen else value
        for name, value in start.items()
    }


def terms_of(backbone, editor, objective, batch, params):
    batch = objective.in_turn(batch.select(objective.slots(editor, batch)), 1)
    prefix = backbone.prefix(batch, *editor.sites)
    with torch.no_grad():
        unedited = objective.unedited(backbone, batch, backbone.suffix(prefix, batch.predict_EKT))
    with editor.applied(backbone, params, batch) as trace:
        hidden = backbone.suffix(prefix, objective.read(batch))
    return objective(backbone, editor, params, trace, batch, hidden, unedited)


def gradient_of(value_E, params):
    leaves = [value for value in params.values() if value.requires_grad]
    return torch.autograd.grad(value_E.sum(), leaves, retain_graph=True, allow_unused=True)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_frozen_documented_and_named_by_its_file(name):
    config_class = objectives.find(name).Config
    config = config_class()
    assert config.name == name and dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.reliability_weight = 2.0
    documented = "".join(base_class.__doc__ or "" for base_class in config_class.__mro__)
    assert all(f"{item.name}:" in documented or f"{item.name}," in documented for item in dataclasses.fields(config))
    assert set(TERMS) <= config.weights.keys() and list(config.weights)[:4] == list(TERMS)


def test_settings_that_objectives_share_have_one_default():
    shared = {}
    for config_class in objectives.configs():
        for item in dataclasses.fields(config_class):
            shared.setdefault(item.name, set()).add((item.type, repr(getattr(config_class(), item.name))))
    assert {name: defaults for name, defaults in shared.items() if len(defaults) > 1} == {}


def test_plug_ins_are_files_and_not_the_packages_beside_them():
    assert objectives.names() == ("contrast", "native", "native_kl", "odedit", "rephrase")


def test_settings_of_other_objectives_are_checked_and_not_read():
    assert ObjectiveConfig("native", warmup=0.5, negatives=3) == ObjectiveConfig("native")
    assert ObjectiveConfig() == ObjectiveConfig(name="odedit", negatives=3)
    with pytest.raises(ValueError, match="warmup: got -1"):
        ObjectiveConfig("native", warmup=-1)
    with pytest.raises(InputError, match=r"Unknown setting of objective 'native' 'warmpu'\. Did you mean 'warmup'"):
        ObjectiveConfig("native", warmpu=0.5)
    with pytest.raises(InputError, match="Unknown objective 'odedt'. Did you mean 'odedit'"):
        ObjectiveConfig("odedt")
    with pytest.raises(ValueError, match="reliability_weight: got 0.0, expected not all risks without weight"):
        ObjectiveConfig("contrast", reliability_weight=0.0, locality_weight=0.0, generality_weight=0.0, own_weight=1.0)


def test_what_is_read_is_known_before_any_batch(editor):
    """A run decides by it whether it needs unrelated records."""
    plain = load_editor("ftl")
    assert ObjectiveConfig("native").reads(plain) == {EDIT}
    assert ObjectiveConfig("native").reads(editor) == {EDIT, *LOCALITY_SLOTS}
    assert ObjectiveConfig("native", own_weight=0.0).reads(editor) == {EDIT}
    assert ObjectiveConfig("native_kl").reads(plain) == {EDIT, *LOCALITY_SLOTS}
    assert ObjectiveConfig("odedit").reads(plain) == set(SUPERVISION_SLOTS)
    assert ObjectiveConfig("contrast").reads(plain) == {EDIT, *REPHRASE_SLOTS, NEAR}
    assert [ObjectiveConfig(name).num_negatives for name in objectives.names()] == [12, 0, 0, 0]


def test_only_a_kernel_of_measured_width_needs_a_bandwidth():
    needing = [
        (ObjectiveConfig(name, kernel=kernel, sigma2_0=sigma2_0).needs_bandwidth)
        for name, kernel, sigma2_0 in (("odedit", "rbf", None), ("odedit", "rbf", 1.0), ("odedit", "linear", None))
    ]
    assert needing == [True, False, False]
    assert ObjectiveConfig("odedit", positions="text").calibrated_positions == "text"
    assert not any(ObjectiveConfig(name).needs_bandwidth for name in ("native", "native_kl", "contrast"))


# --- terms -----------------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_and_so_is_its_gradient(backbone, editor, objective, supervision):
    params = params_of(backbone, editor, supervision)
    terms = terms_of(backbone, editor, objective, supervision, params)
    weights = objective.config.weights
    assert terms.risks.keys() == weights.keys()
    summed = sum(weights[name] * value for name, value in terms.risks.items())
    torch.testing.assert_close(terms.total, summed)
    used = {name for name, value in terms.risks.items() if value.requires_grad}
    assert used >= {"rel", "own"} and ("loc" in used) == objective.compares
    for actual, expected in zip(gradient_of(terms.total, params), gradient_of(summed, params), strict=True):
        assert actual.any()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_row_is_the_edit_alone_whatever_it_is_padded_to(backbone, editor, objective, supervision, requests_8):
    params = params_of(backbone, editor, supervision)
    together = terms_of(backbone, editor, objective, supervision, params)
    pool = make_pool(backbone, NEGATIVES, editor.sites)
    for row in (0, 5):
        batch, _ = encode_requests(backbone, [requests_8[row]], TEMPLATE, editor.sites, pool)
        own = {
            name: value[row : row + 1].detach().requires_grad_(value.requires_grad) for name, value in params.items()
        }
        alone = terms_of(backbone, editor, objective, batch, own)
        for name, value in alone.risks.items():
            torch.testing.assert_close(value, together.risks[name][row : row + 1], rtol=1e-3, atol=1e-5, msg=name)
        for name, value in alone.scale_gradients.items():
            torch.testing.assert_close(value, together.scale_gradients[name][row : row + 1], rtol=1e-2, atol=1e-4)
        for name in ("total", "worst_nll", "worst_trained_nll"):
            actual, expected = getattr(alone, name), getattr(together, name)[row : row + 1]
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_sequences_that_are_not_read_have_no_influence(backbone, editor, objective, supervision):
    read = {slot for slot in supervision.slots if slot in objective.slots(editor, supervision)}
    tokens = supervision.tokens_EKS.clone()
    unread = [column for column, slot in enumerate(supervision.slots) if slot not in read]
    tokens[:, unread] = torch.where(supervision.image_EKS[:, unread], tokens[:, unread], 7)
    params = params_of(backbone, editor, supervision)
    expected = terms_of(backbone, editor, objective, supervision, params)
    actual = terms_of(backbone, editor, objective, replace(supervision, tokens_EKS=tokens), params)
    assert all(torch.equal(value, expected.risks[name]) for name, value in actual.risks.items())
    stopping = Stopping(max_steps=1, worst_token_nll=1e-9)
    for first, second in zip(
        edit(backbone, editor, objective, supervision, stopping),
        edit(backbone, editor, objective, replace(supervision, tokens_EKS=tokens), stopping),
        strict=True,
    ):
        assert first.curves == second.curves


def test_the_unedited_model_is_the_same_kept_or_computed_anew(backbone, editor, objective, supervision, monkeypatch):
    params = params_of(backbone, editor, supervision)
    kept = terms_of(backbone, editor, objective, supervision, params)
    monkeypatch.setattr(base, "_TOKENS_KEPT", 0)
    set_limits(monkeypatch, objective_logits=3 * backbone.vocabulary_size)
    anew = terms_of(backbone, editor, objective, supervision, params)
    for name, value in kept.risks.items():
        torch.testing.assert_close(anew.risks[name], value, rtol=1e-4, atol=1e-6)
    for actual, expected in zip(gradient_of(anew.total, params), gradient_of(kept.total, params), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_for_one_gradient_is_the_same_once(backbone, editor, objective, supervision):
    params = params_of(backbone, editor, supervision)
    plain = terms_of(backbone, editor, objective, supervision, params)
    frugal = terms_of(backbone, editor, objective.for_one_gradient(), supervision, params)
    assert all(torch.equal(value, plain.risks[name]) for name, value in frugal.risks.items())
    assert torch.equal(frugal.penalty, plain.penalty)
    expected = gradient_of(plain.total + plain.penalty, params)
    for actual, value in zip(gradient_of(frugal.total + frugal.penalty, params), expected, strict=True):
        assert torch.equal(actual, value)
    with pytest.raises(RuntimeError):
        gradient_of(frugal.total, params)


def test_a_step_reads_a_part_of_what_more_steps_read(editor, objective, supervision):
    slots = objective.slots(editor, supervision)
    parts = [set(objective.slots_within(slots, steps)) for steps in (1, 2, 99)]
    assert parts[0] <= parts[1] <= parts[2] == set(slots) and set(objective.slots_at_once(slots)) == parts[0]
    assert objective.in_turn(supervision.select(slots), 0).slots == objective.slots_at_once(slots)
    assert (len(parts[0]) < len(slots)) == objective.config.takes_turns


def test_only_environments_have_a_penalty(backbone, editor, objective, supervision):
    params = params_of(backbone, editor, supervision)
    terms = terms_of(backbone, editor, objective, supervision, params)
    assert bool(terms.scale_gradients) == objective.has_environments == bool(terms.penalty.any())
    assert (objective.config.invariance.fixed == 0.0) == (not objective.has_environments)


def test_without_warmup_the_penalty_is_whole_from_the_first_step(objective):
    invariance = objective.without_warmup().config.invariance
    assert objective.config.invariance.fixed == 0.0 or (invariance.warmup, invariance.ramp) == (0.0, 0.0)
    assert type(objective.without_warmup()) is type(objective)


# --- terms beside the four -------------------------------------------------------------------------------------------


def test_what_the_multiplier_reads_is_a_fixed_list():
    one_E = torch.ones(2)
    risks = {name: number * one_E for number, name in enumerate(("norm", "own", "gen", "loc", "rel"))}
    gradients = {name: number * one_E for number, name in enumerate(("zeta", "image_rephrase", "loc", "alpha", "rel"))}
    terms = Terms(risks, one_E, gradients, one_E, one_E, one_E, one_E)
    read_ER, gradients_EN = terms.multiplier_inputs()
    assert read_ER[0].tolist() == [4, 3, 2, 1]  # rel, loc, gen, own
    assert gradients_EN[0].tolist() == [4, 2, 1, 3, 0]  # rel, loc, image_rephrase, alpha, zeta


def test_a_term_of_weight_0_changes_not_one_digit(backbone, supervision, sigma2_0):
    """Neither an edit nor its lambda: the multiplier's network is as wide as without the term."""
    ftl, stopping = load_editor("ftl", {"learning_rate": 3e-3}), Stopping(max_steps=4, worst_token_nll=1e-9)
    settings = {"warmup": 0.0, "ramp": 0.0, "dual_rate": 0.05}
    plain, outside, weighted = (
        edit(backbone, ftl, Objective(ObjectiveConfig(name, **settings, **further), sigma2_0), supervision, stopping)
        for name, further in (("odedit", {}), (OUTSIDE, {}), (OUTSIDE, {"norm_weight": 0.5}))
    )
    for first, second, third in zip(plain, outside, weighted, strict=True):
        curves = dict(second.curves)
        assert len(set(curves.pop("norm"))) > 1 and curves == first.curves
        assert all(torch.equal(value, second.params[name]) for name, value in first.params.items())
        assert third.curves["objective"] != first.curves["objective"]


def test_a_term_of_weight_0_changes_no_digit_of_a_training(backbone, sigma2_0):
    settings = {"sites": ("layers.-1.ffn.out",), "rank": 4, "batch_size": 2, "accumulate": 1, "training_steps": 3}
    records = EncodedRequests(backbone, TEMPLATE, settings["sites"], [make_request(number) for number in range(3)])
    plain, outside = (
        train(
            backbone,
            load_editor("mend", settings),
            Objective(ObjectiveConfig(name, warmup=0.0, ramp=0.0), sigma2_0),
            records,
            records,
        ).state
        for name in ("odedit", OUTSIDE)
    )
    assert plain.dual.steps == outside.dual.steps > 0
    for first, second in ((plain.weights, outside.weights), (plain.dual.delta, outside.dual.delta)):
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_positions_of_the_answers_are_those_of_the_whole(backbone, editor, supervision, sigma2_0):
    """Where states are read at all positions, the answers' are gathered from them."""
    params = params_of(backbone, editor, supervision)
    target, text = (
        Objective(ObjectiveConfig("odedit", positions=positions, generality_weight=0.0), sigma2_0)
        for positions in ("target", "text")
    )
    batch = supervision.select(target.slots(editor, supervision))
    prefix = backbone.prefix(batch, *editor.sites)
    with editor.applied(backbone, params, batch):
        whole = backbone.suffix(prefix)
        read = backbone.suffix(prefix, batch.predict_EKT)
    torch.testing.assert_close(gather_positions(whole, batch.predict_EKT), read, rtol=1e-4, atol=1e-4)
    first, second = (terms_of(backbone, editor, objective, supervision, params) for objective in (target, text))
    torch.testing.assert_close(first.total, second.total, rtol=1e-4, atol=1e-5)
