"""UniKE against loops over the published formulas, autograd and `torch.optim`."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from odedit import InputError, Objective, ObjectiveConfig, Stopping, edit, encode_requests, load_backbone, load_editor
from odedit.editors.common.contrastive import encode, encoder_weights, info_nce, truthfulness_loss
from odedit.editors.common.hooks import rewritten
from odedit.editors.common.knowledge import attend, blend, last_positions, neurons
from odedit.editors.common.weights import save_weights
from odedit.editors.unike import Unike, UnikeConfig
from odedit.runtime.gather import gather_positions
from tests.support import tiny_models
from tests.support.requests import TEMPLATE

CONFIG = UnikeConfig(num_layers=2, learning_rate=0.5, encoder_width=24, code_width=8, neurons=3, beta=0.2)
LAYERS = ("layers.-2", "layers.-1")


@pytest.fixture(scope="module")
def weights(backbone):
    made = Unike(CONFIG).initial_weights(backbone, 1)
    generator = torch.Generator().manual_seed(5)
    for name in made:
        if name.endswith((".zeta", ".back", ".bias")):
            made[name] = 0.1 * torch.randn(made[name].shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def unike(weights):
    return Unike(CONFIG, weights)


@pytest.fixture(scope="module")
def supervision(batches):
    return batches[0]


def hidden_of(backbone, batch, editor):
    return backbone.suffix(backbone.prefix(batch, *editor.sites))


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def random_states(num_states, width=6, seed=0):
    return torch.randn(2, num_states, width, generator=torch.Generator().manual_seed(seed))


def test_attention_over_stored_states_is_the_loop_over_its_states():
    stored, query = random_states(5), random_states(4, seed=1)
    attended = attend(query, stored, 40)
    for g in range(2):
        for n in range(4):
            shares = torch.tensor([float(query[g, n] @ stored[g, m]) / math.sqrt(6) for m in range(5)]).softmax(0)
            expected = sum(share * stored[g, m] for m, share in enumerate(shares))
            torch.testing.assert_close(attended[g, n], expected)


def test_only_the_nearest_states_are_attended_to():
    stored, query = random_states(7), random_states(3, seed=1)
    attended = attend(query, stored, 2)
    for g in range(2):
        for n in range(3):
            order = sorted(range(7), key=lambda m: -cosine(query[g, n], stored[g, m]))[:2]
            torch.testing.assert_close(
                attended[g, n], attend(query[g : g + 1, n : n + 1], stored[g : g + 1, order], 2)[0, 0]
            )


@pytest.mark.parametrize("count", [3, 40])
def test_rows_of_zeros_are_absent(count):
    stored, query = random_states(5), random_states(4, seed=1)
    padded = torch.cat([stored, torch.zeros(2, 9, 6)], dim=1)
    torch.testing.assert_close(attend(query, padded, count), attend(query, stored, count))
    assert not attend(query, torch.zeros(2, 3, 6), count).any()
    keys, bias, values = random_states(3, seed=2), torch.randn(2, 3), random_states(3, seed=3)
    padding = torch.zeros(2, 2, 6)
    torch.testing.assert_close(
        neurons(query, torch.cat([keys, padding], 1), F.pad(bias, (0, 2)), torch.cat([values, padding], 1)),
        neurons(query, keys, bias, values),
    )


def test_blending_keeps_the_norm_and_reaches_from_the_state_to_what_was_attended():
    states, attended = random_states(4, seed=1), random_states(4, seed=2)
    alpha = torch.tensor([[0.0, 0.3, 0.7, 1.0]] * 2)
    blended = blend(states, attended, alpha)
    torch.testing.assert_close(blended.norm(dim=-1), states.norm(dim=-1))
    torch.testing.assert_close(blended[:, 0], states[:, 0])
    torch.testing.assert_close(F.normalize(blended[:, 3], dim=-1), F.normalize(attended[:, 3], dim=-1))
    direction = 0.7 * states[0, 1] / states[0, 1].norm() + 0.3 * attended[0, 1] / attended[0, 1].norm()
    assert cosine(direction, blended[0, 1]) == pytest.approx(1.0)
    torch.testing.assert_close(blend(states, attended, alpha, keeps_norm=False)[0, 1], direction)


def test_the_last_positions_are_taken_in_order():
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()
    position, is_present = last_positions(real, 3)
    assert position[0].tolist() == [2, 3, 4] and is_present[0].all()
    assert position[1, :2].tolist() == [0, 1] and is_present[1].tolist() == [True, True, False]


def test_info_nce_by_hand():
    scores = torch.tensor([[0.9, 0.2, -0.5, 0.4], [0.1, 0.8, 0.3, 0.0], [0.5, 0.5, 0.5, 0.5]])
    positive = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    negative = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]]).bool()

    def term(p, *others):
        return -math.log(math.exp(10 * p) / sum(math.exp(10 * s) for s in (p, *others)))

    first = (term(0.9, 0.2) + term(0.4, 0.2)) / 2
    loss = info_nce(scores, positive, negative, 0.1)
    assert loss.tolist() == pytest.approx([first, term(0.8, 0.1, 0.0), 0.0], rel=1e-4)


def test_info_nce_without_negatives_is_zero_and_has_a_finite_gradient():
    scores = torch.tensor([[0.5, 0.1]], requires_grad=True)
    loss = info_nce(scores, torch.tensor([[True, False]]), torch.zeros(1, 2, dtype=torch.bool), 0.1)
    loss.sum().backward()
    assert loss.item() == 0 and torch.isfinite(scores.grad).all()


def test_the_two_camps_by_hand():
    true = F.normalize(torch.tensor([[1.0, 0.2], [0.9, -0.1]]), dim=-1)
    false = F.normalize(torch.tensor([[-1.0, 0.3], [0.2, 1.0]]), dim=-1)

    def term(code, own, other):
        near = sum(math.exp(10 * float(code @ c)) for c in own)
        return -math.log(near / (near + sum(math.exp(10 * float(code @ c)) for c in other)))

    expected = [(term(true[i], true, false) + term(false[i], false, true)) / 2 for i in range(2)]
    assert truthfulness_loss(true, false, 0.1).tolist() == pytest.approx(expected, rel=1e-3)


def test_codes_are_unit_and_depend_on_the_direction_alone():
    made = encoder_weights(6, 12, 4, torch.Generator().manual_seed(0))
    states = torch.randn(5, 6)
    codes = encode(made, states)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(encode(made, 7 * states), codes)


def by_loops(backbone, params, weights, x, y, entering, layer):
    """The formulas at one position of one edit: output of attention, output of the neurons, and alpha."""
    semantic = {
        name.removeprefix(f"{layer}.semantic."): w for name, w in weights.items() if f"{layer}.semantic." in name
    }

    def code(h):
        scaled = h / h.norm() * math.sqrt(len(h))
        hidden = torch.clamp(semantic["in.weight"] @ scaled + semantic["in.bias"], min=0)
        return semantic["out.weight"] @ hidden + semantic["out.bias"]

    states = [m for m in params[f"{layer}.memory"] if m.any()]
    shares = torch.stack([y @ m / math.sqrt(len(y)) for m in states]).softmax(0)
    attended = sum(share * m for share, m in zip(shares, states, strict=True))
    alpha = max(0.0, cosine(code(attended), code(y)))
    direction = (1 - alpha) * y / y.norm() + alpha * attended / attended.norm()
    blended = y.norm() * direction / direction.norm()
    added = torch.zeros_like(y)
    for key, bias, value in zip(*(params[f"{layer}.{part}"] for part in ("keys", "bias", "values")), strict=True):
        added = added + max(0.0, float(entering @ key + bias)) * value
    return blended, added, alpha


def test_the_edited_forward_is_the_formulas(backbone, unike, weights, supervision):
    params = unike.init(backbone, supervision)
    generator = torch.Generator().manual_seed(2)
    for name in params:
        if not name.endswith("memory"):
            params[name] = params[name] + 0.02 * torch.randn(params[name].shape, generator=generator)
    shape = supervision.tokens_EKS.shape
    plain: dict = {}
    edited: dict = {}

    def keep(into, name):
        def rewrite(x, y):
            into[name] = (x.reshape(*shape, -1), y.reshape(*shape, -1))
            return y

        return rewrite

    names = [f"{layer}.{part}" for layer in LAYERS for part in ("attention.out", "ffn.in", "ffn.out")]
    with torch.no_grad():
        prefix = backbone.prefix(supervision, *unike.sites)
        # Hooks run in the order of registration: one before the editor's, one after.
        with (
            rewritten({backbone.site(name): keep(plain, name) for name in names}),
            unike.applied(backbone, params, supervision) as trace,
            rewritten({backbone.site(name): keep(edited, name) for name in names}),
        ):
            backbone.suffix(prefix)
    for layer in LAYERS:
        for e, k, s in ((0, 0, 9), (0, 3, 2), (5, 1, 20), (7, 4, 12)):
            one = {name: value[e] for name, value in params.items()}
            y, entering = plain[f"{layer}.attention.out"][1][e, k, s], edited[f"{layer}.ffn.in"][0][e, k, s]
            blended, added, alpha = by_loops(backbone, one, weights, None, y, entering, layer)
            torch.testing.assert_close(edited[f"{layer}.attention.out"][1][e, k, s], blended, rtol=1e-4, atol=1e-4)
            change = edited[f"{layer}.ffn.out"][1][e, k, s] - plain[f"{layer}.ffn.out"][1][e, k, s]
            torch.testing.assert_close(change, added, rtol=1e-3, atol=1e-4)
            assert trace.values[f"{layer}.alpha"].reshape(shape)[e, k, s].item() == pytest.approx(alpha, abs=1e-4)
        alpha = trace.values[f"{layer}.alpha"]
        assert bool(((alpha >= 0) & (alpha <= 1 + 1e-5)).all()) and bool((alpha > 0).any())
        before, after = plain[f"{layer}.attention.out"][1], edited[f"{layer}.attention.out"][1]
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_without_its_norm_a_state_is_the_sum_of_unit_vectors(backbone, weights, supervision):
    """As in the public code; an edit without stored states changes no state all the same."""
    editor = Unike(replace(CONFIG, keep_norm=False), weights)
    params = editor.init(backbone, supervision)
    for layer in LAYERS:
        params[f"{layer}.memory"] = params[f"{layer}.memory"].clone()
        params[f"{layer}.memory"][1] = 0.0
    site, seen = f"{LAYERS[0]}.attention.out", []

    def keep(x, y):
        seen.append(y.reshape(*supervision.tokens_EKS.shape, -1))
        return y

    with torch.no_grad():
        prefix = backbone.prefix(supervision, *editor.sites)
        # Hooks run in the order of registration: one before the editor's, one after.
        with (
            rewritten({backbone.site(site): keep}),
            editor.applied(backbone, params, supervision) as trace,
            rewritten({backbone.site(site): keep}),
        ):
            backbone.suffix(prefix)
    before, after = seen
    alpha = trace.values[f"{LAYERS[0]}.alpha"].reshape(supervision.tokens_EKS.shape).unsqueeze(-1)
    attended = attend(before[0].flatten(0, 1)[None], params[f"{LAYERS[0]}.memory"][:1], CONFIG.memory)
    attended = attended.reshape(before[0].shape)
    expected = (1 - alpha[0]) * F.normalize(before[0], dim=-1) + alpha[0] * F.normalize(attended, dim=-1)
    torch.testing.assert_close(after[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(after[1], before[1])


def test_an_edit_starts_with_the_unedited_states_of_its_demonstration(backbone, unike, weights, supervision):
    params = unike.init(backbone, supervision)
    seen = {}
    with (
        torch.no_grad(),
        rewritten(
            {backbone.site(f"{layer}.attention.out"): lambda x, y: seen.setdefault("y", y) for layer in ("layers.-2",)}
        ),
    ):
        hidden_of(backbone, supervision.select(("edit",)), unike)
    for e in range(supervision.num_edits):
        count = int(supervision.real_EKS[e, 0].sum())
        torch.testing.assert_close(params["layers.-2.memory"][e, :count], seen["y"][e, :count])
        assert not params["layers.-2.memory"][e, count:].any()
    shift = weights["layers.-1.back"] @ weights["layers.-1.zeta"]
    assert all(torch.equal(value, CONFIG.beta * shift) for value in params["layers.-1.values"].flatten(0, 1))


def test_neurons_start_awake_at_the_answer_they_stand_for(backbone, weights, supervision):
    editor = Unike(replace(CONFIG, sharpness=3.0, noise=0.0, beta=0.0), weights)
    params = editor.init(backbone, supervision)
    demonstration = supervision.select(("edit",))
    with torch.no_grad(), editor.applied(backbone, params, demonstration) as trace:
        hidden_of(backbone, demonstration, editor)
    entering = trace.values["layers.-1.ffn.in"].reshape(supervision.num_edits, 1, -1, 128)
    states = gather_positions(entering, demonstration.predict_EKT)[:, 0]
    for e in range(supervision.num_edits):
        tokens = int(demonstration.target_mask_EKT[e, 0].sum())
        for i in range(CONFIG.neurons):
            key, bias = params["layers.-1.keys"][e, i], params["layers.-1.bias"][e, i]
            assert float(key @ states[e, i % tokens] + bias) == pytest.approx(1.0, abs=1e-3)


def test_positions_do_not_see_what_follows(backbone, unike, supervision):
    """Under teacher forcing, the answer in the input changes no earlier position, as in generation."""
    params = unike.init(backbone, supervision)
    cut = replace(supervision, tokens_EKS=supervision.tokens_EKS.clone())
    cut.tokens_EKS[:, :, 20:] = 5
    with torch.no_grad(), unike.applied(backbone, params, supervision):
        whole, other = hidden_of(backbone, supervision, unike), hidden_of(backbone, cut, unike)
    torch.testing.assert_close(whole[:, :, :20], other[:, :, :20])
    assert not torch.allclose(whole[:, :, 20:], other[:, :, 20:])


def test_one_native_step_is_that_of_torch(backbone, unike, weights, requests_8):
    """SGD with clipping, on keys, biases and values V of `V + beta zeta'`; stored states are constant."""
    supervision, _ = encode_requests(backbone, requests_8[:1], TEMPLATE)
    config = ObjectiveConfig(name="native")
    (result,) = edit(backbone, unike, Objective(config), supervision, Stopping(max_steps=2))
    batch = supervision.select(("edit",))
    origin = unike.init(backbone, batch)
    leaves = {name: value.clone().requires_grad_() for name, value in origin.items() if not name.endswith("memory")}
    shifts = {}
    for layer in LAYERS:
        shifts[f"{layer}.values"] = CONFIG.beta * (weights[f"{layer}.back"] @ weights[f"{layer}.zeta"])
        leaves[f"{layer}.values"] = torch.zeros_like(origin[f"{layer}.values"]).requires_grad_()
    optimizer = torch.optim.SGD(leaves.values(), lr=CONFIG.learning_rate)
    for step in range(2):
        params = origin | {name: leaf + shifts.get(name, 0.0) for name, leaf in leaves.items()}
        with unike.applied(backbone, params, batch):
            states = gather_positions(hidden_of(backbone, batch, unike), batch.predict_EKT)[0, 0]
        mask = batch.target_mask_EKT[0, 0]
        loss = F.cross_entropy(backbone.head(states)[mask], batch.target_EKT[0, 0][mask])
        assert result.curves["rel"][step] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), CONFIG.clip_norm)
        optimizer.step()
    for name, leaf in leaves.items():
        expected = leaf.detach() + shifts.get(name, 0.0)
        assert not torch.equal(expected, origin[name])
        torch.testing.assert_close(result.params[name], expected, rtol=1e-3, atol=1e-5)
    for layer in LAYERS:
        assert torch.equal(result.params[f"{layer}.memory"], origin[f"{layer}.memory"])


def test_edits_together_share_neurons_and_stored_states(backbone, unike, supervision):
    """The neurons of all edits add up, and a position attends over the stored states of all."""
    params = unike.init(backbone, supervision)
    two = {name: value[:2] for name, value in params.items()}
    batch = replace(supervision)
    with torch.no_grad(), unike.together(backbone, two, batch):
        joint = hidden_of(backbone, batch, unike)
    by_hand = {
        name: torch.cat([value[0], value[1]]).expand(8, *[-1] * (value.dim() - 1)) for name, value in two.items()
    }
    with torch.no_grad(), unike.applied(backbone, by_hand, batch):
        torch.testing.assert_close(joint, hidden_of(backbone, batch, unike), rtol=1e-4, atol=1e-4)
    none = {name: torch.zeros_like(value) for name, value in params.items()}
    with torch.no_grad():
        plain = hidden_of(backbone, batch, unike)
        with unike.applied(backbone, none, batch):
            torch.testing.assert_close(hidden_of(backbone, batch, unike), plain, rtol=1e-4, atol=1e-4)


def test_published_stop_rule(unike):
    loss, right = torch.tensor([0.05, 0.05, 0.5]), torch.tensor([True, False, True])
    assert unike.converged(loss, loss, right, None).tolist() == [True, False, False]


@pytest.mark.parametrize("family", ["minigpt4", "llava"])
def test_text_models_built_like_llama(family, tmp_path, requests_8):
    """With gated feed-forward networks and other norms, an edit learns, and is the same alone and in a batch."""
    model = load_backbone(family, str(tiny_models.write(family, tmp_path / family)))
    editor = Unike(CONFIG, Unike(CONFIG).initial_weights(model, 0))
    batch, _ = encode_requests(model, requests_8[4:7], TEMPLATE)
    together = edit(model, editor, Objective(ObjectiveConfig(name="native")), batch, Stopping(max_steps=4))
    for index, request in enumerate(requests_8[4:7]):
        alone_batch, _ = encode_requests(model, [request], TEMPLATE)
        (alone,) = edit(model, editor, Objective(ObjectiveConfig(name="native")), alone_batch, Stopping(max_steps=4))
        assert alone.curves["rel"] == pytest.approx(together[index].curves["rel"], rel=1e-3)
        assert alone.curves["rel"][-1] < alone.curves["rel"][0]


def test_training_teaches_alpha_and_the_direction(backbone, supervision):
    """After a few steps, alpha is larger at an edit's prompts, and zeta and W_zeta are at their means."""
    config = replace(CONFIG, num_layers=1, train_learning_rate=1e-2, train_batch=8)
    weights = Unike(config).initial_weights(backbone, 0)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    rates = Unike(config).training.rates
    optimizer = torch.optim.Adam([{"params": [v], "lr": rates.get(n, 1e-2)} for n, v in leaves.items()])
    losses = []
    for _ in range(20):
        loss = Unike(config, leaves).native_training_loss(backbone, supervision)
        assert loss.shape == (8,)
        losses.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    trained = Unike(config, {name: value.detach() for name, value in leaves.items()})
    with torch.no_grad(), trained.applied(backbone, trained.init(backbone, supervision), supervision) as trace:
        hidden_of(backbone, supervision, trained)
    alpha = trace.values["layers.-1.alpha"].reshape(supervision.tokens_EKS.shape)
    alpha = alpha.gather(2, supervision.predict_EKT[:, :, :1])[..., 0]
    assert alpha[:, 0].mean() > alpha[:, 3].mean() + 0.3, "the edit against an unrelated question"
    assert all(bool(leaves[f"layers.-1.{name}"].any()) for name in ("zeta", "back"))


def test_a_record_that_a_batch_holds_twice_is_no_negative_of_itself(backbone, unike, weights, supervision):
    layer = LAYERS[0]
    semantic = {
        name.removeprefix(f"{layer}.semantic."): w for name, w in weights.items() if f"{layer}.semantic." in name
    }

    def loss_of(*rows: int) -> list[float]:
        batch = supervision.take(torch.tensor(rows))
        with torch.no_grad():
            old = unike._with_old_answer(backbone, batch.select(("edit",)))
            new, previous = (unike._states(backbone, part)[layer] for part in (batch, old))
            return unike._semantic_loss(semantic, new, previous, batch, old).tolist()

    alone = loss_of(0)
    assert loss_of(0, 0) == pytest.approx(2 * alone, rel=1e-4)
    assert loss_of(0, 1)[0] > 1.01 * alone[0]


def test_zeta_is_pulled_to_the_mean_difference_and_moves_no_encoder(backbone, supervision, weights):
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    Unike(CONFIG, leaves).native_training_loss(backbone, supervision).mean().backward()
    zeta = weights["layers.-1.zeta"]
    # d/dzeta of the mean over records and layers of |zeta - d_e|^2 is 2 (zeta - mean d) / layers.
    mean = zeta - leaves["layers.-1.zeta"].grad * len(LAYERS) / 2
    moved = {**weights, "layers.-1.zeta": mean}
    at = {name: value.clone().requires_grad_() for name, value in moved.items()}
    Unike(CONFIG, at).native_training_loss(backbone, supervision).mean().backward()
    torch.testing.assert_close(at["layers.-1.zeta"].grad, torch.zeros_like(mean), atol=1e-5, rtol=0)
    for name, leaf in at.items():
        if ".semantic." in name or ".truth." in name:
            torch.testing.assert_close(leaf.grad, leaves[name].grad, rtol=1e-4, atol=1e-6)


def test_the_old_answer_is_what_the_unedited_model_says(backbone, unike, requests_8):
    from odedit.evaluation.scores import EvaluationConfig, evaluate

    supervision, evaluation = encode_requests(backbone, requests_8, TEMPLATE)
    with torch.no_grad():
        old = unike._with_old_answer(backbone, supervision.select(("edit",)))
    rows = evaluate(backbone, unike, unike.init(backbone, supervision), evaluation, EvaluationConfig(generate=True))
    tokenizer = backbone.processor.tokenizer
    for e, row in enumerate(rows):
        tokens = old.tokens_EKS[e, 0][old.real_EKS[e, 0] & ~old.prompt_EKS[e, 0]].tolist()
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == row["answer_before"]
    assert torch.equal(
        old.tokens_EKS.masked_fill(~old.prompt_EKS, 0),
        supervision.select(("edit",)).tokens_EKS.masked_fill(~old.prompt_EKS, 0),
    )


def test_a_checkpoint_is_asked_for_and_must_fit(backbone, weights, tmp_path):
    settings = {name: value for name, value in asdict(CONFIG).items() if name != "checkpoint"}
    with pytest.raises(InputError, match="odedit train unike"):
        load_editor("unike", settings).check(backbone)
    path = tmp_path / "unike.safetensors"
    save_weights(path, weights, "unike", Unike(CONFIG).weight_settings, backbone.fingerprint)
    load_editor("unike", {**settings, "checkpoint": str(path)}).check(backbone)
    with pytest.raises(InputError, match="another setting of the editor"):
        load_editor("unike", {**settings, "code_width": 16, "checkpoint": str(path)}).check(backbone)
    with pytest.raises(InputError, match="num_layers: got 5, the text model has 4"):
        load_editor("unike", {**settings, "num_layers": 5, "checkpoint": str(path)}).check(backbone)
    with pytest.raises(InputError, match="train_batch: got 1, expected a whole number >= 2"):
        load_editor("unike", {"train_batch": 1})
