"""The training loop: resumed bit for bit, stopped early, and with a learned multiplier under ODEdit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from odedit import InputError, Objective, ObjectiveConfig, encode_requests, load_editor
from odedit.objectives.contrast import Contrast
from odedit.training.loop import TrainingError, adam_step, draw, train
from odedit.training.multiplier import Dual, SharedMultiplier
from odedit.training.records import EncodedRequests
from odedit.training.state import TrainingState, read_state, write_state
from tests.support.requests import TEMPLATE, make_pool, make_request

SETTINGS = {
    "sites": ("layers.-1.ffn.in", "layers.-1.ffn.out"), "rank": 4, "edit_rate": 1e-2, "learning_rate": 1e-3,
    "batch_size": 2, "accumulate": 2, "training_steps": 6, "validate_every": 2,
}  # fmt: skip
ODEDIT = ObjectiveConfig(sigma2_0=1.0, warmup=0.0, ramp=0.0)
NATIVE = ObjectiveConfig(name="native")
CONTRAST = ObjectiveConfig(name="contrast", negatives=5, negatives_at_once=2)


@pytest.fixture(scope="module")
def sites():
    return SETTINGS["sites"]


@pytest.fixture(scope="module")
def records(backbone, sites):
    pool = make_pool(backbone, 5, sites)
    return EncodedRequests(backbone, TEMPLATE, sites, [make_request(number) for number in range(5)], pool)


@pytest.fixture(scope="module")
def validation(backbone, sites):
    pool = make_pool(backbone, 5, sites)
    return EncodedRequests(backbone, TEMPLATE, sites, [make_request(number) for number in range(5, 8)], pool)


def mend(**settings):
    return load_editor("mend", {**SETTINGS, **settings})


def test_records_are_encoded_as_for_an_edit(backbone, records, sites):
    requests = [make_request(number) for number in (3, 1)]
    expected, _ = encode_requests(backbone, requests, TEMPLATE, sites, make_pool(backbone, 5, sites))
    batch = records.batch([3, 1])
    assert batch.edit_ids == expected.edit_ids
    assert torch.equal(batch.tokens_EKS, expected.tokens_EKS)
    for e in range(2):
        for k in range(len(batch.slots)):
            if int(expected.picture_EK[e, k]) >= 0:
                row = batch.features_NLD[int(batch.picture_EK[e, k])]
                torch.testing.assert_close(row, expected.features_NLD[int(expected.picture_EK[e, k])])


def test_every_record_is_drawn_once_before_any_is_drawn_again():
    order = [number for first in range(0, 12, 3) for number in draw(3, 4, first, seed=1)]
    assert order == draw(12, 4, 0, seed=1)
    assert [sorted(order[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert all(order != draw(12, 4, 0, seed) for seed in (2, 257))
    assert len({tuple(order[i : i + 4]) for i in (0, 4, 8)}) > 1, "each pass has an order of its own"


def test_adam_is_that_of_torch():
    torch.manual_seed(0)
    settings = dataclasses.replace(mend().training, clip_norm=None, rates={"b": 0.1})
    state = TrainingState.of({"a": torch.randn(3, 2), "b": torch.randn(4)})
    leaves = {name: value.clone().requires_grad_() for name, value in state.weights.items()}
    optimizer = torch.optim.Adam([{"params": [leaves["a"]], "lr": 1e-3}, {"params": [leaves["b"]], "lr": 0.1}])
    for _ in range(4):
        gradients = {name: torch.randn_like(value) for name, value in leaves.items()}
        state = adam_step(state, gradients, settings)
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].clone()
        optimizer.step()
    for name, leaf in leaves.items():
        torch.testing.assert_close(state.weights[name], leaf.detach())
    clipped = adam_step(TrainingState.of({"a": torch.zeros(2)}), {"a": torch.tensor([3.0, 4.0])},
                        dataclasses.replace(settings, clip_norm=1.0))  # fmt: skip
    torch.testing.assert_close(clipped.first["a"], 0.1 * torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize(
    ("objective", "interrupted_after"),
    [(NATIVE, 4), (ODEDIT, 3), (CONTRAST, 3)],
    ids=["native", "odedit", "contrast"],
)
def test_resumed_is_uninterrupted_bit_for_bit(backbone, records, validation, tmp_path, objective, interrupted_after):
    whole = train(backbone, mend(), Objective(objective), records, validation, seed=3)
    assert whole.state.step == 6 and whole.state.stop_reason == "max_steps"

    def interrupt(state, figures):
        if state.step == interrupted_after and figures:
            raise KeyboardInterrupt

    path = tmp_path / "state.safetensors"
    run = {"seed": 3, "path": path, "identity": {"data": "a"}}
    with pytest.raises(KeyboardInterrupt):
        train(backbone, mend(), Objective(objective), records, validation, progress=interrupt, **run)
    assert read_state(path, {"data": "a"}).step == interrupted_after
    steps = []
    resumed = train(backbone, mend(), Objective(objective), records, validation,
                    progress=lambda state, figures: steps.append(state.step), **run)  # fmt: skip
    assert min(steps) >= interrupted_after
    assert resumed.state.losses == whole.state.losses
    assert resumed.state.looks == whole.state.looks
    for name, value in whole.weights.items():
        assert torch.equal(resumed.weights[name], value), name
    for name, value in whole.state.weights.items():
        assert torch.equal(resumed.state.weights[name], value), name
    for name, value in whole.state.dual.delta.items():
        assert torch.equal(resumed.state.dual.delta[name], value), name
    again = train(backbone, mend(), Objective(objective), records, validation, **run)
    assert again.state.step == 6 and all(torch.equal(again.weights[n], v) for n, v in whole.weights.items())


def test_the_best_weights_are_kept_and_training_stops_without_improvement(backbone, records, validation):
    # Steps so large that every later validation is worse than the first.
    editor = mend(learning_rate=0.02, rate_learning_rate=0.05, validate_every=1, patience=2, training_steps=50)
    trained = train(backbone, editor, Objective(NATIVE), records, validation)
    assert trained.state.stop_reason == "patience"
    losses = [loss for _, loss in trained.state.looks]
    assert trained.state.best_loss == min(losses)
    assert trained.state.looks[-3][0] == trained.state.best_step, "two looks without improvement, and no more"
    best = mend().with_weights(trained.weights)
    with torch.no_grad():
        loss_E = best.native_training_loss(backbone, validation.batch([0, 1, 2]))
    assert float(loss_E.mean()) == pytest.approx(trained.state.best_loss, rel=1e-4)


@pytest.mark.parametrize(
    "objective",
    [NATIVE, dataclasses.replace(ODEDIT, penalty="none"), CONTRAST],
    ids=["native", "odedit", "contrast"],
)
def test_training_lowers_its_loss(backbone, records, validation, objective):
    editor = mend(training_steps=12, validate_every=12, learning_rate=1e-4, rate_learning_rate=1e-3, batch_size=5)
    trained = train(backbone, editor, Objective(objective), records, records)
    assert trained.state.best_step == 12
    assert trained.state.best_loss < 0.98 * trained.state.looks[0][1]
    initial = train(backbone, mend(training_steps=1), Objective(objective), records, validation).state
    assert not torch.equal(trained.weights["rate"], initial.best["rate"])


def test_a_record_meets_other_negatives_in_other_steps(backbone, records, validation, monkeypatch):
    seen = []
    of_turn = Contrast.in_turn
    monkeypatch.setattr(Contrast, "in_turn", lambda *given: seen.append(of_turn(*given)) or seen[-1])
    train(backbone, mend(training_steps=12, batch_size=1, validate_every=100), Objective(CONTRAST), records, validation)
    of_first = {tuple(batch.features_NLD[batch.picture_EK[0, 2:]].flatten(1).sum(1).tolist()) for batch in seen
                if batch.edit_ids == ("edit-0",)}  # fmt: skip
    assert len(of_first) > 1
    assert {len(batch.slots) for batch in seen} == {4}


def test_native_kl_adds_the_locality_risk_alone(backbone, records, validation):
    def first_look(config):
        return train(backbone, mend(training_steps=1), Objective(config), records, validation).state.looks[0][1]

    locality = dataclasses.replace(ODEDIT, reliability_weight=0.0, generality_weight=0.0, locality_weight=0.5)
    both = first_look(ObjectiveConfig(name="native_kl", locality_weight=0.5))
    assert both == pytest.approx(first_look(NATIVE) + first_look(locality), rel=1e-4)
    assert both > 1.001 * first_look(NATIVE)


def test_under_odedit_the_multiplier_moves_and_raises_the_objective(backbone, records, validation):
    shown = []
    trained = train(backbone, mend(), Objective(ODEDIT), records, validation,
                    progress=lambda state, figures: shown.append(figures))  # fmt: skip
    figures = [figure for figure in shown if figure]
    assert trained.state.dual.steps == 5, "one dual step after each primal step that had a penalty"
    for figure in figures:
        assert figure["lambda"] > 0 and figure["penalty"] > 0
        assert figure["loss"] > figure["rel"] + figure["loc"] + figure["gen"]
    again = SharedMultiplier(ODEDIT, 6, 0)
    initial = again._initial(torch.zeros(1, trained.state.dual.delta["weight_0"].shape[1]))
    assert any(not torch.equal(initial[name], value) for name, value in trained.state.dual.delta.items())


def test_a_dual_step_is_ascent(backbone, records):
    """The dual step raises lambda at the same point, because the penalty is never negative."""
    editor = mend()
    editor = editor.with_weights(editor.initial_weights(backbone, 0))
    batch = records.batch([0, 1])
    params = editor.init(backbone, batch)
    objective = Objective(ODEDIT)
    prefix = backbone.prefix(batch, *editor.sites)
    with torch.no_grad():
        base = objective.unedited(backbone, batch, backbone.suffix(prefix, batch.predict_EKT))
        with editor.applied(backbone, params, batch) as trace:
            terms = objective(backbone, editor, params, trace, batch, backbone.suffix(prefix, batch.predict_EKT), base)
    shared = SharedMultiplier(ODEDIT, 6, 0)
    _, first_E, dual = shared.penalised(editor, params, terms, Dual(), 1, is_first=False)
    _, second_E, dual = shared.penalised(editor, params, terms, dual, 1)
    assert dual.steps == 1
    assert bool((second_E > first_E).all())
    waiting = SharedMultiplier(dataclasses.replace(ODEDIT, warmup=0.5), 6, 0)
    loss_E, nothing_E, dual = waiting.penalised(editor, params, terms, Dual(), 1)
    assert torch.equal(loss_E, terms.total) and not nothing_E.any() and dual.steps == 0


def test_a_loss_that_is_not_finite_is_reported(backbone, records, validation):
    editor = mend(edit_rate=1e30)
    with pytest.raises(TrainingError, match="not finite at step 0 .*edit-.*--fresh"):
        train(backbone, editor, Objective(NATIVE), records, validation)


def test_a_state_of_another_training_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    state = TrainingState.of({"a": torch.ones(2)})
    assert state.best_loss == math.inf
    write_state(path, state, {"editor.rank": 4, "sites": ("a",)})
    read = read_state(path, {"editor.rank": 4, "sites": ("a",)})
    assert read.step == 0 and torch.equal(read.weights["a"], torch.ones(2))
    with pytest.raises(InputError, match="editor.rank: was 4, now 8"):
        read_state(path, {"editor.rank": 8, "sites": ("a",)})
    path.write_bytes(b"\x00" * 30)
    with pytest.raises(InputError, match="is damaged"):
        read_state(path, {})
