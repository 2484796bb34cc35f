"""T-Patcher against the published formulas, in loops over the library's own modules."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from odedit import (
    InputError,
    Objective,
    ObjectiveConfig,
    Stopping,
    calibrate,
    edit,
    encode_requests,
    load_backbone,
    load_editor,
    stack_params,
)
from odedit.editors.base import Trace
from odedit.editors.tpatcher import _mean_exp, _to_correct
from odedit.runtime.gather import gather_positions
from tests.support import tiny_models
from tests.support.requests import TEMPLATE, make_request

NATIVE = Objective(ObjectiveConfig(name="native"))
PARTS = ("k", "b", "v", "a")


def ffn_inputs(backbone, batch):
    """Input of the last layer's feed-forward network, `(E, K, S, D)`, from a hook on the library's module."""
    seen = []
    layer = backbone.model.language_model.model.decoder.layers[-1]
    handle = layer.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        backbone.suffix(backbone.prefix(batch, "layers.0.ffn.in"))
    handle.remove()
    return seen[0].reshape(*batch.tokens_EKS.shape, -1)


def states_of(batch, inputs, e):
    """States that predict the edit's target tokens, and the tokens."""
    count = int(batch.target_mask_EKT[e, 0].sum())
    return inputs[e, 0, batch.predict_EKT[e, 0, :count]], batch.target_EKT[e, 0, :count]


def unedited_choice(backbone, batch):
    with torch.no_grad():
        hidden = backbone.suffix(backbone.prefix(batch, "layers.0.ffn.in"))
        return backbone.head(gather_positions(hidden, batch.predict_EKT))[:, 0].argmax(dim=-1)


def mean_of_largest(values, top):
    kept = sorted(values, reverse=True)[:top]
    return sum(kept) / len(kept)


def losses(k, b, own, memory, config):
    """l_a and l_m1 + l_m2 of one edit's neurons, term by term."""
    active = [k[n] @ own[n] + b[n] for n in range(len(k))]
    inputs = [[k[n] @ m + b[n] for m in memory] for n in range(len(k))]
    l_a = mean_of_largest([torch.exp(-a) for a in active], config.activation_top)
    silent = [torch.exp(i + config.margin_silent) for row in inputs for i in row]
    gap = [torch.exp(i - a + config.margin_gap) for a, row in zip(active, inputs, strict=True) for i in row]
    return l_a, mean_of_largest(silent, config.memory_top) + mean_of_largest(gap, config.memory_top)


@pytest.fixture(scope="module")
def three(backbone, requests_8):
    """Edits whose targets have different numbers of wrong tokens."""
    return encode_requests(backbone, requests_8[:3], TEMPLATE)


@pytest.fixture(scope="module")
def pool(backbone):
    return encode_requests(backbone, [make_request(number) for number in (20, 21)], TEMPLATE)[0]


def test_native_steps_are_the_published_ones(backbone, three, pool):
    """Loss, gradient, clipping and Adam of three steps, on the library's modules, one edit at a time."""
    batch = three[0]
    editor = load_editor("tpatcher", {"memory_states": 12, "memory_top": 7, "max_neurons": 3})
    editor = editor.measured(backbone, pool)
    config, memory = editor.config, editor._memory_states_MD
    results = edit(backbone, editor, NATIVE, batch, Stopping(max_steps=3))
    start = editor.init(backbone, batch)
    layer = backbone.model.language_model.model.decoder.layers[-1]
    residual = backbone.prefix(batch, *editor.sites).hidden_RSD.reshape(*batch.tokens_EKS.shape, -1)
    inputs = ffn_inputs(backbone, batch)
    for e, result in enumerate(results):
        own = start["states"][e][start["states"][e].abs().sum(1) > 0]
        count = len(own)
        _, target = states_of(batch, inputs, e)
        at = batch.predict_EKT[e, 0, : len(target)]
        h, before = inputs[e, 0, at], residual[e, 0, at]
        k, b, v, a = trained = [start[name][e, :count].clone().requires_grad_() for name in PARTS]
        optimizer = torch.optim.Adam(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        for step in range(4):
            out = before + layer.fc2(layer.fc1(h).relu()) + (h @ k.T + b).relu() @ (a * v)
            logits = backbone.model.language_model.lm_head(
                backbone.model.language_model.model.decoder.final_layer_norm(out)
            )
            nll = functional.cross_entropy(logits, target, label_smoothing=config.label_smoothing)
            l_a, l_m = losses(k, b, own, memory, config)
            loss = nll + 1.0 * l_a + 5.0 * l_m
            assert result.curves["rel"][step] == pytest.approx(nll.item(), rel=1e-4)
            assert result.curves["objective"][step] == pytest.approx(loss.item(), rel=1e-4)
            if step == 3:
                break
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
            assert step or norm > config.clip_norm, "nothing was clipped: the test shows less than it says"
            optimizer.step()
        for name, expected in zip(PARTS, trained, strict=True):
            torch.testing.assert_close(result.params[name][0, :count], expected.detach(), rtol=1e-3, atol=2e-5)
            assert not torch.equal(expected, start[name][e, :count])


@pytest.mark.parametrize("layer", [-1, 1])
def test_phi_0_from_a_prefix_is_phi_0_in_any_layer(backbone, three, layer):
    editor = load_editor("tpatcher", {"layer": layer})
    prefix = backbone.prefix(three[0], *editor.sites)
    expected = editor.init(backbone, three[0])
    for name, value in editor.init(backbone, three[0], prefix).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_a_neuron_for_each_wrong_token_with_input_1(backbone, three):
    batch = three[0]
    editor = load_editor("tpatcher", {"max_neurons": 4})
    params = editor.init(backbone, batch)
    inputs, choice = ffn_inputs(backbone, batch), unedited_choice(backbone, batch)
    for e in range(batch.num_edits):
        states, target = states_of(batch, inputs, e)
        wrong = states[choice[e, : len(target)] != target][:4]
        assert len(wrong), "every token is right: the test shows nothing"
        torch.testing.assert_close(params["states"][e, : len(wrong)], wrong, rtol=1e-5, atol=1e-5)
        for n, state in enumerate(wrong):
            assert float(params["k"][e, n] @ state + params["b"][e, n]) == pytest.approx(1.0, abs=1e-5)
            torch.testing.assert_close(params["k"][e, n], state / state.norm() ** 2, rtol=1e-4, atol=1e-7)
        assert not any(value[e, len(wrong) :].any() for value in params.values())
        assert set(params["a"][e, : len(wrong)].unique().tolist()) == {10.0}
    drawn = params["v"][params["a"] != 0]
    assert drawn.std() == pytest.approx(1.0, abs=0.1) and drawn.mean() == pytest.approx(0.0, abs=0.1)


def test_v_is_drawn_for_the_edit_not_for_its_place(backbone, requests_8):
    editor = load_editor("tpatcher", {"max_neurons": 1})
    first, second = (encode_requests(backbone, order, TEMPLATE)[0] for order in (requests_8[:2], requests_8[1::-1]))
    v, swapped = editor.init(backbone, first)["v"], editor.init(backbone, second)["v"]
    assert torch.equal(v, swapped.flip(0)) and not torch.equal(v[0], v[1])
    other = load_editor("tpatcher", {"max_neurons": 1, "seed": 1})
    assert not torch.equal(other.init(backbone, first)["v"], v)


def test_which_tokens_get_a_neuron():
    logits = torch.tensor([[[4.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 9.0]]]).expand(2, -1, -1)
    mask = torch.tensor([[True, True, True, False]]).expand(2, -1)
    target = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0]])
    expected = [[False, True, False, False], [True, False, True, False]]
    assert _to_correct(logits, target, mask).tolist() == expected, "the least likely token; the wrong tokens"


@pytest.mark.parametrize("source", ["measured", "locality", "earlier"])
def test_own_risk_by_hand(backbone, three, pool, source):
    batch = three[0]
    editor = load_editor("tpatcher", {"memory_top": 6, "activation_top": 1, "max_neurons": 3})
    params = editor.init(backbone, batch)
    generator = torch.Generator().manual_seed(1)
    params["k"] = params["k"] + 0.02 * torch.randn(params["k"].shape, generator=generator)
    params["b"] = params["b"] + 0.1 * torch.randn(params["b"].shape, generator=generator)
    params = editor.constrain(params)
    inputs = ffn_inputs(backbone, batch)
    memories = [inputs[e, 3:][batch.real_EKS[e, 3:]] for e in range(batch.num_edits)]
    if source == "measured":
        editor = editor.measured(backbone, pool)
        memories = [editor._memory_states_MD] * batch.num_edits
    if source == "earlier":
        earlier = load_editor("tpatcher").init(backbone, pool)
        editor = editor.following(earlier)
        states = torch.cat([state[state.any(dim=1)] for state in earlier["states"]])
        memories = [torch.cat([memory, states]) for memory in memories]
    with torch.no_grad(), editor.applied(backbone, params, batch) as trace:
        backbone.suffix(backbone.prefix(batch, *editor.sites))
    risk_E = editor.own_risk(params, trace, batch)
    for e in range(batch.num_edits):
        count = int(params["states"][e].any(dim=1).sum())
        own = params["states"][e, :count]
        l_a, l_m = losses(params["k"][e, :count], params["b"][e, :count], own, memories[e], editor.config)
        assert float(risk_E[e]) == pytest.approx(float(l_a + 5 * l_m), rel=1e-4)


def test_an_edit_without_memory_has_no_memory_loss(backbone, three):
    batch = three[0].select(("edit",))
    editor = load_editor("tpatcher", {"activation_weight": 3.0})
    params = editor.init(backbone, batch)
    with editor.applied(backbone, params, batch) as trace:
        backbone.suffix(backbone.prefix(batch, *editor.sites))
    # A neuron's initial input is 1.
    torch.testing.assert_close(editor.own_risk(params, trace, batch), torch.full((3,), 3 * math.exp(-1.0)))


def test_memory_is_what_a_hook_sees_at_real_positions(backbone, pool):
    editor = load_editor("tpatcher")
    measured = editor.measured(backbone, pool)
    inputs = ffn_inputs(backbone, pool)
    expected = [
        inputs[e, k, s]
        for k in range(len(pool.slots))
        for e in range(pool.num_edits)
        for s in range(inputs.shape[2])
        if pool.real_EKS[e, k, s]
    ]
    torch.testing.assert_close(measured._memory_states_MD, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert measured.own_slots == ("edit",) and len(editor.own_slots) == 4 and editor._memory_states_MD is None
    few = load_editor("tpatcher", {"memory_states": 10})
    one, again = (few.measured(backbone, pool)._memory_states_MD for _ in range(2))
    assert torch.equal(one, again) and len(one.unique(dim=0)) == 10
    other = load_editor("tpatcher", {"memory_states": 10, "seed": 1}).measured(backbone, pool)._memory_states_MD
    assert not torch.equal(one, other)
    assert all(bool((state == measured._memory_states_MD).all(dim=1).any()) for state in one)


def test_chunks_of_edits_are_the_whole(backbone, three, pool, monkeypatch):
    batch = three[0]
    editor = load_editor("tpatcher").measured(backbone, pool)
    params = editor.init(backbone, batch)
    with editor.applied(backbone, params, batch) as trace:
        whole = editor.own_risk(params, trace, batch)
    monkeypatch.setattr("odedit.editors.tpatcher._CHUNK", 1)
    torch.testing.assert_close(editor.own_risk(params, trace, batch), whole)


def test_large_exponents_stay_finite_and_keep_their_gradient():
    exponents = torch.tensor([[500.0, -1.0], [2.0, -torch.inf]], requires_grad=True)
    mean_E = _mean_exp(exponents, 5, torch.tensor([2, 1]))
    assert bool(torch.isfinite(mean_E).all()) and mean_E[1].item() == pytest.approx(math.exp(2.0))
    (gradient,) = torch.autograd.grad(mean_E.sum(), exponents)
    assert float(gradient[0, 0]) == pytest.approx(math.exp(30.0) / 2)
    assert gradient[1].tolist() == [pytest.approx(math.exp(2.0)), 0.0]


def test_absent_neurons_stay_absent_and_change_nothing(backbone, three, requests_8):
    supervision, evaluation = three
    editor = load_editor("tpatcher")
    # A learned multiplier reads all of phi_e and gives all of it a gradient.
    objective = Objective(ObjectiveConfig(warmup=0.0, ramp=0.0), calibrate(backbone, requests_8, TEMPLATE))
    results = edit(backbone, editor, objective, supervision, Stopping(max_steps=4))
    lengths = [int(result.params["states"].any(dim=-1).sum()) for result in results]
    assert len(set(lengths)) > 1, "all have the same number of neurons: the test shows nothing"
    for result, length in zip(results, lengths, strict=True):
        assert not any(value[:, length:].any() for value in result.params.values())
    assert results[0].params["k"].shape[1] == max(lengths), "the neurons that no edit has are cut off"
    stacked = stack_params([result.params for result in results])
    longer = {
        name: torch.cat([value, value.new_zeros(len(value), 3, *value.shape[2:])], dim=1)
        for name, value in stacked.items()
    }
    index = lengths.index(min(lengths))
    trimmed = {name: value[index : index + 1, : lengths[index]] for name, value in stacked.items()}
    alone = evaluation.take(torch.tensor([index]))
    padded = logits_with(backbone, editor, longer, evaluation)
    torch.testing.assert_close(padded, logits_with(backbone, editor, stacked, evaluation))
    torch.testing.assert_close(padded[index : index + 1], logits_with(backbone, editor, trimmed, alone))


@torch.no_grad()
def logits_with(backbone, editor, params, batch, how="applied"):
    prefix = backbone.prefix(batch, *editor.sites)
    with getattr(editor, how)(backbone, params, batch):
        return backbone.head(gather_positions(backbone.suffix(prefix), batch.predict_EKT))


def answers(backbone, editor, params, batch, how):
    """True when every token of the edit is the model's first choice."""
    right = logits_with(backbone, editor, params, batch, how)[:, 0].argmax(dim=-1) == batch.target_EKT[:, 0]
    return bool((right | ~batch.target_mask_EKT[:, 0]).all())


def test_edits_one_after_another(backbone, requests_8):
    """Earlier neurons are constants; the model after the last edit has all neurons and still answers the first edit."""
    first, second = (encode_requests(backbone, [requests_8[number]], TEMPLATE)[0] for number in (0, 1))
    editor = load_editor("tpatcher", {"learning_rate": 0.03})
    (one,) = edit(backbone, editor, NATIVE, first, Stopping(max_steps=150))
    assert one.stop_reason == "converged" and answers(backbone, editor, one.params, first, "applied")
    kept = {name: value.clone() for name, value in one.params.items()}

    later = editor.following(one.params)
    (two,) = edit(backbone, later, NATIVE, second, Stopping(max_steps=150))
    assert two.stop_reason == "converged"
    assert all(torch.equal(value, one.params[name]) for name, value in kept.items())
    assert all(torch.equal(value, later._earlier[name][:, : value.shape[1]]) for name, value in kept.items())

    both = stack_params([one.params, two.params])
    for batch in (first, second):
        assert answers(backbone, editor, both, batch, "together")
        torch.testing.assert_close(
            logits_with(backbone, editor, both, batch, "together"),
            logits_with(backbone, later, two.params, batch),
            rtol=1e-4,
            atol=1e-4,
        )
    assert not answers(backbone, editor, two.params, first, "applied"), "the second alone knows the first"
    third = editor.following(later.extended(backbone, two.params))
    num_neurons = int(both["states"].any(dim=-1).sum())
    assert third._earlier["k"].shape[1] == num_neurons and later._earlier["k"].shape[1] < num_neurons
    # The patched model is right already, which leaves one neuron, of the least likely token.
    assert int(third.init(backbone, first)["states"].any(dim=-1).sum()) == 1
    assert int(editor.init(backbone, first)["states"].any(dim=-1).sum()) > 1


def test_it_stops_when_right_and_active():
    editor = load_editor("tpatcher")
    active = torch.tensor([[3.0, 3.0, torch.inf], [3.0, 1.0, torch.inf], [3.0, torch.inf, torch.inf]])
    right = torch.tensor([True, True, False])
    stopped = editor.converged(torch.zeros(3), torch.zeros(3), right, Trace({"activation_EN": active}))
    # exp(-3) = 0.05; the mean of exp(-3) and exp(-1) is 0.21.
    assert stopped.tolist() == [True, False, False]


@torch.no_grad()
def test_beside_a_gated_network(tmp_path):
    """The library's own block, with the neurons' output added by hand."""
    backbone = load_backbone("llava", str(tiny_models.write("llava", tmp_path / "llava")))
    batch, _ = encode_requests(backbone, [make_request(0), make_request(1, full=False)], TEMPLATE)
    editor = load_editor("tpatcher", {"layer": 0, "max_neurons": 2})
    editor.check(backbone)
    params = editor.init(backbone, batch)
    edited = logits_with(backbone, editor, params, batch)
    prefix = backbone.prefix(batch, *editor.sites)
    down, gate, up = (backbone.site(f"layers.0.ffn.{part}") for part in ("out", "gate", "in"))
    seen = []
    handle = gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    unedited = backbone.head(gather_positions(backbone.suffix(prefix), batch.predict_EKT))
    handle.remove()
    h = seen[0].reshape(*batch.tokens_EKS.shape, -1)
    branch = torch.stack(
        [
            (h[e] @ params["k"][e].T + params["b"][e]).relu() @ (params["a"][e] * params["v"][e])
            for e in range(batch.num_edits)
        ]
    )
    network = (functional.silu(gate(h)) * up(h)) @ down.weight.T + (0 if down.bias is None else down.bias) + branch
    handle = down.register_forward_hook(lambda module, args, output: network.reshape(output.shape))
    by_hand = backbone.head(gather_positions(backbone.suffix(prefix), batch.predict_EKT))
    handle.remove()
    torch.testing.assert_close(edited, by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(edited, unedited, atol=1e-2)


def test_settings_are_checked(backbone):
    with pytest.raises(InputError, match="max_neurons: got 0"):
        load_editor("tpatcher", {"max_neurons": 0})
    with pytest.raises(InputError, match="label_smoothing: got 1.0"):
        load_editor("tpatcher", {"label_smoothing": 1.0})
    with pytest.raises(InputError, match="layers.<0..3>"):
        load_editor("tpatcher", {"layer": 7}).check(backbone)
    assert dataclasses.asdict(load_editor("tpatcher").config)["memory_states"] == 40000
