"""MEND against independent computations: autograd's weight gradient, loops over tokens, dense matrices."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from odedit import InputError, Objective, ObjectiveConfig, edit, encode_requests, load_editor, stack_params
from odedit.editors.common.hooks import rewritten
from odedit.editors.common.weights import save_weights
from odedit.runtime.gather import gather_positions
from tests.support.requests import TEMPLATE, make_request

SITES = ("layers.2.ffn.in", "layers.2.ffn.out", "layers.-1.ffn.in", "layers.-1.ffn.out")
SETTINGS = {"sites": SITES, "rank": 16, "edit_rate": 0.01}


@pytest.fixture(scope="module")
def mend(backbone):
    editor = load_editor("mend", SETTINGS)
    return editor.with_weights(editor.initial_weights(backbone, 0))


def randomised(backbone, mend, seed=0):
    """Weights that all differ from the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    weights = mend.initial_weights(backbone, 0)
    return {
        name: value.abs() + 0.5 if name.endswith(".std") else value
        for name, value in (
            (name, value + 0.1 * torch.randn(value.shape, generator=generator)) for name, value in weights.items()
        )
    }


def nll(backbone, batch):
    """Mean NLL of the edit's target tokens, by loops."""
    logits = backbone.head(gather_positions(backbone.suffix(backbone.prefix(batch, *SITES)), batch.predict_EKT))
    log_p = torch.log_softmax(logits[0, 0], dim=-1)
    length = int(batch.target_mask_EKT[0, 0].sum())
    return -sum(log_p[t, batch.target_EKT[0, 0, t]] for t in range(length)) / length


def test_untrained_it_is_a_gradient_step(backbone, mend, requests_8):
    """With the identity network and no statistics the update is -rate times autograd's gradient of the weight."""
    batch, _ = encode_requests(backbone, requests_8[:1], TEMPLATE)
    only_edit = batch.select(("edit",))
    modules = {name: backbone.site(name) for name in SITES}
    for module in modules.values():
        module.weight.requires_grad_(True)
    try:
        expected = torch.autograd.grad(nll(backbone, only_edit), [module.weight for module in modules.values()])
    finally:
        for module in modules.values():
            module.weight.requires_grad_(False)
    update = mend.merged(mend.init(backbone, batch))
    for name, gradient in zip(SITES, expected, strict=True):
        torch.testing.assert_close(update[name], -0.01 * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("start", ["paper", "public_code"])
def test_the_update_is_the_published_formula(backbone, start, requests_8):
    """Token by token: normalised, two residual blocks with per-site scale and shift, outer products summed."""
    mend = load_editor("mend", SETTINGS | {"start": start})
    weights = randomised(backbone, mend)
    batch, _ = encode_requests(backbone, requests_8[:1], TEMPLATE)
    update = mend.with_weights(weights).merged(mend.with_weights(weights).init(backbone, batch))
    seen, shifts = {}, {}

    def watch(name):
        def rewrite(x, y):
            shifts[name] = torch.zeros_like(y, requires_grad=True)
            seen[name] = x.detach()
            return y + shifts[name]

        return rewrite

    with rewritten({backbone.site(name): watch(name) for name in SITES}):
        loss = nll(backbone, batch.select(("edit",)))
    deltas = dict(zip(SITES, torch.autograd.grad(loss, [shifts[name] for name in SITES]), strict=True))
    for index, name in enumerate(SITES):
        out_width, in_width = backbone.site(name).weight.shape
        shape = f"{out_width}x{in_width}"
        expected = torch.zeros(out_width, in_width)
        for x, delta in zip(seen[name].reshape(-1, in_width), deltas[name].reshape(-1, out_width), strict=True):
            if not delta.any():
                continue
            z = (torch.cat([x, delta]) - weights[f"{name}.mean"]) / weights[f"{name}.std"]
            u, v = weights[f"{shape}.first.u"], weights[f"{shape}.first.v"]
            h = (
                weights[f"{name}.first.scale"] * (u @ (v @ z) + weights[f"{shape}.bias"])
                + weights[f"{name}.first.shift"]
            )
            z = z + torch.relu(h)
            u, v = weights[f"{shape}.second.u"], weights[f"{shape}.second.v"]
            bias = weights[f"{shape}.second.bias"] if start == "public_code" else 0.0
            h = weights[f"{name}.second.scale"] * (u @ (v @ z) + bias) + weights[f"{name}.second.shift"]
            z = z + torch.relu(h)
            expected -= weights["rate"][index] * torch.outer(z[in_width:], z[:in_width])
        torch.testing.assert_close(update[name], expected, rtol=1e-3, atol=1e-4)


def test_factors_compute_what_dense_matrices_do(backbone, mend, batches):
    supervision, evaluation = batches
    editor = mend.with_weights(randomised(backbone, mend, 1))
    params = editor.init(backbone, supervision)
    inputs = {}
    with editor.applied(backbone, params, evaluation), torch.no_grad():
        watch = {backbone.site(name): lambda x, y, name=name: inputs.setdefault(name, (x, y))[1] for name in SITES}
        with rewritten(watch):
            backbone.suffix(backbone.prefix(evaluation, *SITES))
    for name, (x, y) in inputs.items():
        site = backbone.site(name)
        x_ENI, y_ENO = x.reshape(8, -1, x.shape[-1]), y.reshape(8, -1, y.shape[-1])
        for e in range(8):
            dense = editor.merged({key: value[e : e + 1] for key, value in params.items()})[name]
            expected = torch.nn.functional.linear(x_ENI[e], site.weight + dense, site.bias)
            torch.testing.assert_close(y_ENO[e], expected, rtol=1e-3, atol=1e-3)


def test_only_tokens_with_a_gradient_are_kept_and_padding_computes_as_absent(backbone, mend, batches, requests_8):
    supervision, _ = batches
    params = mend.init(backbone, supervision)
    for index in range(8):
        alone = mend.init(backbone, encode_requests(backbone, [requests_8[index]], TEMPLATE)[0])
        for name, value in alone.items():
            length = value.shape[1]
            torch.testing.assert_close(params[name][index, :length], value[0], rtol=1e-3, atol=1e-5)
            assert not params[name][index, length:].any()
    # After the last layer's attention, only positions that predict the answer have a gradient.
    targets = int(supervision.target_mask_EKT[:, 0].sum(-1).max())
    assert params["layers.-1.ffn.out.x"].shape[1] == targets
    assert params["layers.2.ffn.in.x"].shape[1] > targets


def test_statistics_are_those_of_the_tokens_with_a_gradient(backbone, mend, requests_8):
    batch, _ = encode_requests(backbone, requests_8, TEMPLATE)
    parts = [encode_requests(backbone, requests_8[i : i + 4], TEMPLATE)[0] for i in (0, 4)]
    weights = mend.estimated(backbone, mend.initial_weights(backbone, 0), parts)
    raw = load_editor("mend", SETTINGS | {"edit_rate": 1.0})
    params = raw.with_weights(raw.initial_weights(backbone, 0)).init(backbone, batch)
    for name in SITES:
        z = torch.cat([params[f"{name}.x"], -params[f"{name}.delta"]], dim=-1).flatten(0, 1)
        z = z[z.any(-1)].double()
        in_width = backbone.site(name).weight.shape[1]
        torch.testing.assert_close(weights[f"{name}.mean"], z.mean(0).float(), rtol=1e-3, atol=1e-6)
        for part in (slice(0, in_width), slice(in_width, None)):
            floor = 0.1 * z[:, part].var(0).mean().sqrt()
            expected = z[:, part].std(0).clamp_min(float(floor)).float()
            torch.testing.assert_close(weights[f"{name}.std"][part], expected, rtol=1e-3, atol=1e-7)
    assert torch.equal(weights["rate"], mend.initial_weights(backbone, 0)["rate"]), "only statistics are measured"


def test_native_loss_is_the_published_one(backbone, requests_8):
    settings = SETTINGS | {"text_rephrase_weight": 0.3, "image_locality_weight": 0.7}
    editor = load_editor("mend", settings)
    editor = editor.with_weights(randomised(backbone, editor, 2))
    requests = [requests_8[index] for index in (1, 5)]  # the second lacks image_rephrase and image_locality
    batch, _ = encode_requests(backbone, requests, TEMPLATE)
    loss_E = editor.native_training_loss(backbone, batch)
    weights = {"text_rephrase": 0.3, "image_rephrase": 0.1, "text_locality": 1.0, "image_locality": 0.7}
    for e, request in enumerate(requests):
        one, _ = encode_requests(backbone, [request], TEMPLATE)
        params = editor.init(backbone, one)
        expected = 0.0
        for slot, weight in weights.items():
            if slot not in request.supervision:
                continue
            part = one.select((slot,))
            prefix = backbone.prefix(part, *SITES)
            length = int(part.target_mask_EKT[0, 0].sum())
            with torch.no_grad():
                q = torch.log_softmax(backbone.head(gather_positions(backbone.suffix(prefix), part.predict_EKT)), -1)
                with editor.applied(backbone, params, part):
                    hidden = backbone.suffix(prefix)
                p = torch.log_softmax(backbone.head(gather_positions(hidden, part.predict_EKT)), -1)
            for t in range(length):
                if slot.endswith("locality"):
                    term = (q[0, 0, t].exp() * (q[0, 0, t] - p[0, 0, t])).sum()
                else:
                    term = -p[0, 0, t, part.target_EKT[0, 0, t]]
                expected = expected + weight * term / length
        assert float(loss_E[e]) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("start", ["paper", "public_code"])
def test_every_learned_weight_gets_a_gradient_from_the_start(backbone, start, batches):
    """The initial identity has gradients for all weights."""
    supervision, _ = batches
    mend = load_editor("mend", SETTINGS | {"start": start})
    weights = {name: value.requires_grad_() for name, value in mend.initial_weights(backbone, 0).items()}
    loss = mend.with_weights(weights).native_training_loss(backbone, supervision).mean()
    gradients = dict(
        zip(
            weights,
            torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True),
            strict=True,
        )
    )
    for name, gradient in gradients.items():
        if name.endswith((".u", ".bias", ".shift")) or name == "rate":
            assert gradient.any(), name


def test_the_public_start_is_larger_and_has_a_second_bias(backbone, mend):
    """Both starts are the identity; they differ in the scale of the first factor, and in how fast they learn."""
    public = load_editor("mend", SETTINGS | {"start": "public_code"}).initial_weights(backbone, 0)
    paper = mend.initial_weights(backbone, 0)
    assert public.keys() - paper.keys() == {"512x128.second.bias", "128x512.second.bias"}
    assert all(not public[name].any() for name in public if name.endswith((".u", ".bias", ".shift")))
    for name in ("512x128.first.v", "128x512.second.v"):
        assert float(public[name].std()) == pytest.approx(1.0, rel=0.03)
        ratio = float(public[name].std() / paper[name].std())
        assert ratio == pytest.approx(math.sqrt((16 + 640) / 2), rel=0.03)


def test_statistics_stay_as_they_were_measured(backbone, mend, batches):
    supervision, _ = batches
    weights = {name: value.requires_grad_() for name, value in randomised(backbone, mend, 4).items()}
    loss = mend.with_weights(weights).native_training_loss(backbone, supervision).mean()
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    unmoved = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
    assert unmoved == {f"{site}.{statistic}" for site in mend.sites for statistic in ("mean", "std")}


def test_one_network_per_shape(backbone, mend):
    names = set(mend.initial_weights(backbone, 0))
    assert {name.split(".")[0] for name in names if name.endswith(".u")} == {"512x128", "128x512"}
    weights = load_editor("mend", SETTINGS | {"rank": 5000}).initial_weights(backbone, 0)
    assert weights["512x128.first.u"].shape == (640, 640), "no rank beyond the width"


def test_together_is_the_sum_of_the_updates(backbone, mend, batches):
    supervision, _ = batches
    editor = mend.with_weights(randomised(backbone, mend, 3))
    params = editor.init(backbone, supervision)
    each = [editor.merged({key: value[e : e + 1] for key, value in params.items()}) for e in range(8)]
    for name, dense in editor.merged(params).items():
        torch.testing.assert_close(dense, sum(one[name] for one in each), rtol=1e-4, atol=1e-5)


def test_the_edit_is_what_init_says(backbone, mend, batches):
    supervision, _ = batches
    results = edit(backbone, mend, Objective(ObjectiveConfig(name="native")), supervision)
    params = mend.init(backbone, supervision)
    stacked = stack_params([result.params for result in results])
    assert all(torch.equal(stacked[name], params[name]) for name in params)
    assert {result.steps for result in results} == {0}


def test_a_missing_or_foreign_checkpoint_is_named(backbone, mend, tmp_path):
    with pytest.raises(InputError, match="`odedit train mend --config F --out FILE` makes one"):
        load_editor("mend", SETTINGS).check(backbone)
    with pytest.raises(InputError, match="no such file"):
        load_editor("mend", SETTINGS | {"checkpoint": str(tmp_path / "none")}).check(backbone)
    path = tmp_path / "mend.safetensors"
    weights = mend.initial_weights(backbone, 0)
    save_weights(path, weights, "mend", mend.weight_settings, backbone.fingerprint)
    load_editor("mend", SETTINGS | {"checkpoint": str(path)}).check(backbone)
    for other in ({"rank": 8}, {"start": "public_code"}):
        with pytest.raises(InputError, match="trained for another setting"):
            load_editor("mend", SETTINGS | {"checkpoint": str(path)} | other).check(backbone)
    save_weights(path, weights, "mend", mend.weight_settings, "0" * 16)
    with pytest.raises(InputError, match="trained by an earlier odedit"):
        load_editor("mend", SETTINGS | {"checkpoint": str(path)}).check(backbone)
    save_weights(path, weights, "mend", mend.weight_settings, "0" * len(backbone.fingerprint))
    with pytest.raises(InputError, match="trained for another model"):
        load_editor("mend", SETTINGS | {"checkpoint": str(path)}).check(backbone)
    with pytest.raises(InputError, match="expected different matrices"):
        load_editor("mend", {"sites": ("layers.3.ffn.in", "layers.-1.ffn.in")}).check(backbone)


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("edit_rate", 0.0), ("clip_norm", -1.0), ("sites", ())])
def test_settings_are_checked(name, value):
    with pytest.raises(InputError, match=name):
        load_editor("mend", {name: value})
    assert dataclasses.asdict(load_editor("mend").config)["training_steps"] == 30_000


def test_an_edit_without_text_rephrase_has_a_loss_all_the_same(backbone, mend):
    request = make_request(3)
    bare = dataclasses.replace(request, supervision={"text_locality": request.supervision["text_locality"]})
    batch, _ = encode_requests(backbone, [bare], TEMPLATE)
    assert torch.isfinite(mend.native_training_loss(backbone, batch)).all()
