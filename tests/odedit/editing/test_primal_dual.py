"""Primal steps against torch.optim, the dual step against its formula, edits in a batch against edits alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from odedit.editing import primal_dual
from odedit.editing.primal_dual import PrimalDual
from odedit.editors.base import OptimizerSettings
from odedit.errors import InputError
from odedit.objectives import ObjectiveConfig
from odedit.objectives.common.multiplier import MultiplierConfig, MultiplierNetwork
from odedit.objectives.common.terms import TERMS, Terms
from tests.support.primal_dual import step

TARGET = torch.linspace(-1, 1, 12).reshape(3, 4)


class PlainEditor:
    """The attributes of an editor that the optimiser reads."""

    frozen: frozenset[str] = frozenset()
    length_varies = False

    def __init__(self, optimizer: OptimizerSettings) -> None:
        self.optimizer = optimizer

    def constrain(self, params):
        return params


def terms_of(params, penalty_weight=0.0):
    """A quadratic whose minimum differs per edit."""
    flat = params["weight"].flatten(1)
    total = ((flat - TARGET[: len(flat)]) ** 2).sum(1) * torch.arange(1, len(flat) + 1)
    gradient = flat.sum(1)
    return Terms(
        risks={name: total if name == "rel" else torch.zeros_like(total) for name in TERMS},
        total=total,
        scale_gradients={"rel": gradient},
        penalty=penalty_weight * gradient.square(),
        worst_nll=total.detach(),
        worst_trained_nll=total.detach(),
        all_right=torch.zeros(len(flat), dtype=torch.bool),
    )


def run(settings, config, steps=6, active=None, num_edits=3, penalty_weight=0.0):
    optimizer = PrimalDual(PlainEditor(settings), config, steps, seed=3)
    origin = {"weight": torch.zeros(num_edits, 2, 2)}
    params = {"weight": origin["weight"].clone().requires_grad_()}
    state = optimizer.init(params)
    active = torch.ones(num_edits, dtype=torch.bool) if active is None else active
    logs = []
    for _ in range(steps):
        params, state, log = step(optimizer, params, origin, state, terms_of(params, penalty_weight), active)
        logs.append(log)
    return params, state, logs


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (OptimizerSettings("sgd", 0.05, 0.01), lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01)),
        (OptimizerSettings("adam", 0.05, 0.1), lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1)),
        (OptimizerSettings("adamw", 0.05, 0.1), lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
    ],
)
def test_steps_equal_torch_optim_edit_by_edit(settings, reference):
    params, _, _ = run(settings, ObjectiveConfig(name="native"))
    for index in range(3):
        weight = torch.zeros(1, 2, 2, requires_grad=True)
        optimizer = reference([weight])
        for _ in range(6):
            optimizer.zero_grad()
            (((weight.flatten(1) - TARGET[index]) ** 2).sum() * (index + 1)).backward()
            optimizer.step()
        torch.testing.assert_close(params["weight"][index : index + 1], weight, rtol=1e-5, atol=1e-6)


def test_clipping_is_per_edit_and_equals_torch():
    settings = OptimizerSettings("sgd", 0.1, clip_norm=0.5)
    params, _, _ = run(settings, ObjectiveConfig(name="native"))
    for index in range(3):
        weight = torch.zeros(1, 2, 2, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            (((weight.flatten(1) - TARGET[index]) ** 2).sum() * (index + 1)).backward()
            torch.nn.utils.clip_grad_norm_([weight], 0.5)
            optimizer.step()
        torch.testing.assert_close(params["weight"][index : index + 1], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_no_mask_is_a_mask_of_all_edits(kind):
    optimizer = PrimalDual(PlainEditor(OptimizerSettings(kind, 0.1, 0.01)), ObjectiveConfig(name="native"), 6)
    params = {"weight": torch.zeros(3, 2, 2, requires_grad=True)}
    state = optimizer.init(params)
    for _ in range(2):
        total_E = terms_of(params, 0.0).total
        masked, masked_state = optimizer.descend(params, state, total_E, torch.ones(3, dtype=torch.bool))
        total_E = terms_of(params, 0.0).total
        params, state = optimizer.descend(params, state, total_E, None)
        assert torch.equal(params["weight"], masked["weight"]) and params["weight"].requires_grad
        assert torch.equal(state.steps_E, masked_state.steps_E)
        pairs = [zip(state.moments[name], masked_state.moments[name], strict=True) for name in state.moments]
        assert all(torch.equal(moment, expected) for pair in pairs for moment, expected in pair)


def test_inactive_edits_keep_parameters_moments_and_network():
    active = torch.tensor([True, False, True])
    config = ObjectiveConfig(warmup=0.0, ramp=0.0)
    params, state, _ = run(OptimizerSettings("adam", 0.1), config, active=active, penalty_weight=1.0)
    assert torch.equal(params["weight"][1], torch.zeros(2, 2))
    assert all(torch.equal(moment[1], torch.zeros(2, 2)) for moment in state.moments["weight"])
    assert state.steps_E.tolist() == [6, 0, 6]
    fresh = MultiplierNetwork.init(config.multiplier, state.delta["weight_0"].shape[1], 1, seed=3)
    assert all(torch.equal(value[1], fresh[name][0]) for name, value in state.delta.items())
    assert not torch.equal(state.delta["weight_0"][0], fresh["weight_0"][0])


@pytest.mark.parametrize("kind", ["sketch", "flat"])
def test_dual_step_is_the_formula_at_the_updated_parameters(kind):
    """delta + gamma_2 grad / (|grad| (k + 1)^1.0001), with the penalty at the phi_e that the primal step reached."""
    config = ObjectiveConfig(warmup=0.0, ramp=0.0, dual_rate=0.01, multiplier=MultiplierConfig(input=kind))
    settings = OptimizerSettings("sgd", 0.05)
    optimizer = PrimalDual(PlainEditor(settings), config, 10, seed=3)
    origin = {"weight": torch.zeros(3, 2, 2)}
    params = {"weight": origin["weight"].clone().requires_grad_()}
    state = optimizer.init(params)
    active = torch.ones(3, dtype=torch.bool)
    params, first, _ = step(optimizer, params, origin, state, terms_of(params, 1.0), active)
    terms = terms_of(params, 1.0)
    _, second, _ = step(optimizer, params, origin, first, terms, active)

    context = optimizer._context(params, origin, terms).detach()
    delta = {name: value.detach().clone().requires_grad_() for name, value in first.delta.items()}
    value = MultiplierNetwork.apply(config.multiplier, delta, context) * terms.penalty.detach()
    gradients = torch.autograd.grad(value.sum(), list(delta.values()))
    for index in range(3):
        norm = torch.cat([gradient[index].flatten() for gradient in gradients]).norm()
        for (name, before), gradient in zip(delta.items(), gradients, strict=True):
            expected = before[index] + 0.01 / norm * gradient[index]
            torch.testing.assert_close(second.delta[name][index], expected, rtol=1e-4, atol=1e-7)
    assert first.dual_steps_E.tolist() == [0, 0, 0]
    assert second.dual_steps_E.tolist() == [1, 1, 1]


def test_ascent_raises_lambda_and_the_primal_step_includes_its_gradient():
    settings = OptimizerSettings("sgd", 1e-4)
    base = {"warmup": 0.0, "ramp": 0.0, "dual_rate": 0.05}
    _, _, logs = run(settings, ObjectiveConfig(**base), penalty_weight=1.0)
    assert all(logs[-1]["lambda"] > logs[0]["lambda"])
    attached, _, _ = run(settings, ObjectiveConfig(**base), penalty_weight=1e4)
    detached, _, _ = run(
        settings, ObjectiveConfig(**base, multiplier=MultiplierConfig(detach=True)), penalty_weight=1e4
    )
    assert not torch.allclose(attached["weight"], detached["weight"])


def test_no_penalty_before_the_end_of_the_warm_up():
    config = ObjectiveConfig(penalty="fixed:1.0", warmup=0.5, ramp=0.0)
    _, _, logs = run(OptimizerSettings("sgd", 0.01), config, steps=8, penalty_weight=1.0)
    assert [float(log["lambda"][0]) for log in logs] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("penalty", ["adaptive", "fixed:0.5", "none"])
def test_an_edit_moves_as_if_alone(penalty):
    config = ObjectiveConfig(penalty=penalty, warmup=0.0, ramp=0.0)
    settings = OptimizerSettings("adam", 0.1, clip_norm=1.0)
    together, _, _ = run(settings, config, penalty_weight=1.0)
    alone, _, _ = run(settings, config, penalty_weight=1.0, num_edits=1)
    torch.testing.assert_close(alone["weight"][0], together["weight"][0], rtol=1e-5, atol=1e-7)


def test_the_state_of_edits_that_join_is_padded_as_they_are():
    """A new edit is longer or shorter than the others: moments are padded with zeros."""
    optimizer = PrimalDual(PlainEditor(OptimizerSettings("adam", 0.1)), ObjectiveConfig(name="native"), 5)
    for old, new in ((2, 3), (3, 2)):
        state = optimizer.init({"weight": torch.ones(2, old, 4)})
        moments = {"weight": (torch.full((2, old, 4), 0.5), torch.full((2, old, 4), 0.25))}
        joined = optimizer.joined(replace(state, moments=moments), {"weight": torch.ones(1, new, 4)})
        first, second = joined.moments["weight"]
        assert first.shape == second.shape == (3, 3, 4)
        assert (first[:2, :old] == 0.5).all() and (second[:2, :old] == 0.25).all()
        assert first[:2, old:].abs().sum() == first[2].abs().sum() == 0


def test_a_flat_multiplier_needs_edits_of_one_length():
    editor = PlainEditor(OptimizerSettings("sgd", 0.1))
    editor.length_varies = True
    flat = ObjectiveConfig(multiplier=MultiplierConfig(input="flat"))
    with pytest.raises(InputError, match=r"multiplier\.input: got 'flat'.*use 'sketch'"):
        PrimalDual(editor, flat, 5)
    PrimalDual(editor, replace(flat, penalty="none"), 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": "fixed:-1"}, "penalty: got 'fixed:-1'"),
        ({"penalty": "sometimes"}, "expected 'adaptive', 'none' or 'fixed:<number >= 0>'"),
        ({"kernel": "cubic"}, "expected 'rbf' or 'linear' or 'contrastive'"),
        ({"bandwidths": ()}, "bandwidths"),
        ({"locality_weight": -1.0}, "locality_weight: got -1.0"),
        ({"dual_rate": 0.0}, "dual_rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_large_edits_move_in_place_to_the_same_bits(kind, monkeypatch):
    settings = OptimizerSettings(kind, 0.1, 0.01, clip_norm=0.7)
    config = ObjectiveConfig(warmup=0.0, ramp=0.0)
    for active in (None, torch.tensor([True, False, True])):
        results = []
        for least in (2**18, 1):
            monkeypatch.setattr(primal_dual, "_LARGE_VALUES", least)
            results.append(run(settings, config, active=active, penalty_weight=1.0))
        (params, state, _), (moved, moved_state, _) = results
        assert torch.equal(params["weight"], moved["weight"]) and moved["weight"].requires_grad
        assert torch.equal(state.steps_E, moved_state.steps_E)
        for name, pair in state.moments.items():
            assert all(map(torch.equal, pair, moved_state.moments[name]))


def test_an_edit_that_moves_in_place_keeps_its_memory(monkeypatch):
    monkeypatch.setattr(primal_dual, "_LARGE_VALUES", 1)
    optimizer = PrimalDual(PlainEditor(OptimizerSettings("adamw", 0.1)), ObjectiveConfig(name="native"), 6)
    params = {"weight": torch.zeros(3, 2, 2, requires_grad=True)}
    state = optimizer.init(params)
    moved, after = optimizer.descend(params, state, terms_of(params).total, None)
    assert moved["weight"].data_ptr() == params["weight"].data_ptr()
    assert after.moments["weight"][0].data_ptr() == state.moments["weight"][0].data_ptr()
