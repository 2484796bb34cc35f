"""Penalty, schedule, count-sketch and multiplier: oracles in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from odedit import irm_tv
from odedit.edits import EditParams
from odedit.irm_tv import (
    MAX_SKETCH_DIM,
    CountSketch,
    MultiplierConfig,
    MultiplierNetwork,
    features,
    flat_input,
    penalty_schedule,
    tv_penalty,
)
from odedit.mmd import mmd2_rbf
from odedit.risks import locality, reliability

E = 3
SIZES = {"weight": 40, "bias": 7}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def random_delta(num_edits: int = E, dtype: torch.dtype = torch.float64) -> EditParams:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(num_edits, 8, 5, generator=generator, dtype=torch.float64).to(dtype),
        "bias": torch.randn(num_edits, 7, generator=generator, dtype=torch.float64).to(dtype),
    }


# --- penalty -----------------------------------------------------------------------------------------------------


def test_opposite_gradients_do_not_cancel() -> None:
    gradient_E = torch.tensor([2.0, -1.0], requires_grad=True)
    penalty_E = tv_penalty([gradient_E, -gradient_E])
    assert penalty_E.tolist() == [16.0, 4.0]
    stacked_EN = torch.stack([gradient_E, -gradient_E], dim=-1)
    assert tv_penalty(stacked_EN).tolist() == [16.0, 4.0]
    penalty_E.sum().backward()
    assert gradient_E.grad is not None
    assert gradient_E.grad.tolist() == [16.0, -8.0]


def test_absent_environments_do_not_count() -> None:
    gradients_EN = torch.tensor([[1.0, float("nan")], [1.0, 2.0]], requires_grad=True)
    penalty_E = tv_penalty(gradients_EN, torch.tensor([[True, False], [True, True]]))
    assert penalty_E.tolist() == [1.0, 9.0]
    penalty_E.sum().backward()
    assert gradients_EN.grad is not None
    assert gradients_EN.grad.tolist() == [[2.0, 0.0], [6.0, 6.0]]


def test_no_gradient_where_every_environment_is_invariant() -> None:
    gradients_EN = torch.zeros(2, 3, requires_grad=True)
    tv_penalty(gradients_EN).sum().backward()
    assert gradients_EN.grad is not None
    assert (gradients_EN.grad == 0).all()


def environments(states_EKTD: Tensor, head_DV: Tensor, base_ETV: Tensor, target_ET: Tensor) -> list[tuple]:
    """IN with NLL, SE with MMD, OUT with KL, on the states that w scales."""
    mask_ET = torch.ones_like(target_ET, dtype=torch.bool)
    edit_ETD, rephrase_ETD, out_ETD = states_EKTD.unbind(1)
    sigma2_Q = torch.tensor([1.0, 4.0], dtype=torch.float64)
    return [
        reliability(edit_ETD @ head_DV, target_ET, mask_ET),
        mmd2_rbf(edit_ETD, rephrase_ETD, mask_ET, mask_ET, sigma2_Q),
        locality(out_ETD @ head_DV, base_ETV, mask_ET),
    ]


def plain_values(states_EKTD: Tensor, head_DV: Tensor, base_ETV: Tensor, target_ET: Tensor) -> list[Tensor]:
    """The same risks by their definitions, which autograd differentiates as often as it likes."""
    log_p_EKTV, log_q_ETV = (states_EKTD @ head_DV).log_softmax(-1), base_ETV.log_softmax(-1)
    nll_ET = -log_p_EKTV[:, 0].gather(-1, target_ET.unsqueeze(-1)).squeeze(-1)
    kl_ET = (log_p_EKTV[:, 2].exp() * (log_p_EKTV[:, 2] - log_q_ETV)).sum(-1)
    mmd_E = environments(states_EKTD, head_DV, base_ETV, target_ET)[1].value
    return [nll_ET.mean(-1), mmd_E, kl_ET.mean(-1)]


def test_penalty_trains_parameters_as_double_backward_through_w_does() -> None:
    tokens, hidden, vocabulary = 3, 5, 9
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs_EKTD, phi_EDD = draw(E, 3, tokens, hidden), draw(E, hidden, hidden).requires_grad_()
    head_DV, base_ETV = draw(hidden, vocabulary), draw(E, tokens, vocabulary)
    target_ET = torch.randint(vocabulary, (E, tokens), generator=generator)
    states_EKTD = torch.tanh(inputs_EKTD @ phi_EDD[:, None])

    closed = environments(states_EKTD, head_DV, base_ETV, target_ET)
    closed_penalty_E = tv_penalty([risk.scale_gradient for risk in closed])
    (got,) = torch.autograd.grad(closed_penalty_E.sum(), phi_EDD, retain_graph=True)

    w_EN = torch.ones(E, 3, dtype=torch.float64, requires_grad=True)
    slopes = []
    for environment in range(3):
        w_E111 = w_EN[:, environment].view(-1, 1, 1, 1)
        value_E = plain_values(w_E111 * states_EKTD, head_DV, base_ETV, target_ET)[environment]
        slopes.append(torch.autograd.grad(value_E.sum(), w_EN, create_graph=True)[0][:, environment])
    penalty_E = tv_penalty(slopes)
    (expected,) = torch.autograd.grad(penalty_E.sum(), phi_EDD)

    torch.testing.assert_close(closed_penalty_E, penalty_E, rtol=0, atol=1e-10)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 0.1


# --- schedule ----------------------------------------------------------------------------------------------------


def test_schedule_is_off_then_ramps_then_stays_on() -> None:
    factors = [penalty_schedule(step, 100) for step in range(100)]
    assert factors[:26] == [0.0] * 26
    assert factors[30] == pytest.approx(0.5)
    assert factors[35:] == [1.0] * 65
    assert factors == sorted(factors)


def test_schedule_without_warmup_or_ramp() -> None:
    assert penalty_schedule(0, 10, warmup=0.0, ramp=0.0) == 1.0
    assert [penalty_schedule(step, 4, warmup=0.5, ramp=0.0) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]


def test_schedule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="max_steps: got 0"):
        penalty_schedule(0, 0)
    with pytest.raises(ValueError, match=r"warmup, ramp: got -0.1"):
        penalty_schedule(0, 10, warmup=-0.1)


# --- sketch ------------------------------------------------------------------------------------------------------


def dense_map(sketch: CountSketch) -> Tensor:
    """The sketch's linear part as a matrix, weights in order of the tensors' names."""
    rows = []
    for name in sketch.sizes:
        for index in range(sketch.sizes[name]):
            unit = {key: torch.zeros(1, size, dtype=torch.float64) for key, size in sketch.sizes.items()}
            unit[name][0, index] = 1.0
            rows.append(sketch(unit)[0, : sketch.dim])
    return torch.stack(rows)


def test_sketch_and_its_gradient_equal_a_dense_matrix() -> None:
    sketch = CountSketch(SIZES, dim=16, seed=3)
    matrix_NP = dense_map(sketch)
    assert (matrix_NP.abs().sum(1) == 1).all()
    delta = {name: tensor.requires_grad_() for name, tensor in random_delta().items()}
    out_EP = sketch(delta)
    assert out_EP.shape == (E, sketch.out_dim) == (E, 18)
    dense_EP = flat_input(delta) @ matrix_NP
    torch.testing.assert_close(out_EP[:, :16], dense_EP)
    weights_EP = torch.randn(E, 16, dtype=torch.float64)
    got = torch.autograd.grad((out_EP[:, :16] * weights_EP).sum(), list(delta.values()))
    expected = torch.autograd.grad((dense_EP * weights_EP).sum(), list(delta.values()))
    torch.testing.assert_close(got, expected)


def test_weights_of_one_block_never_meet() -> None:
    matrix_NP = dense_map(CountSketch({"weight": 40}, dim=16))
    for block_BP in matrix_NP.split(16):
        assert block_BP.abs().sum(0).max() == 1, "each bucket has one weight of a block at most"
    first, second, _ = matrix_NP.abs().split(16)
    assert not torch.equal(first, second), "each block has a permutation of its own"
    assert set(matrix_NP.sum(1).tolist()) == {-1.0, 1.0}


def test_sketch_gradcheck() -> None:
    sketch = CountSketch(SIZES, dim=16)
    delta = random_delta(2)

    def call(weight: Tensor, bias: Tensor) -> Tensor:
        return sketch({"weight": weight, "bias": bias})

    inputs = (delta["weight"].requires_grad_(), delta["bias"].requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_sketch_in_chunks_equals_sketch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch, delta = CountSketch(SIZES, dim=16), random_delta()
    delta["weight"].requires_grad_()
    at_once = sketch(delta)
    (gradient,) = torch.autograd.grad(at_once.square().sum(), delta["weight"])
    monkeypatch.setitem(irm_tv._SKETCHED_AT_ONCE, "cpu", 6)
    in_chunks = sketch(delta)
    torch.testing.assert_close(in_chunks, at_once)
    torch.testing.assert_close(torch.autograd.grad(in_chunks.square().sum(), delta["weight"])[0], gradient)


def test_sketch_preserves_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 1, 200, generator=generator, dtype=torch.float64)).unbind()
    b = b + a
    dim, products = 32, []
    for seed in range(400):
        sketch = CountSketch({"weight": 200}, dim=dim, seed=seed)
        products.append((sketch({"weight": a})[0, :dim] @ sketch({"weight": b})[0, :dim]).item())
    drawn = torch.tensor(products, dtype=torch.float64)
    exact = (a * b).sum().item()
    variance_bound = (a.square().sum() * b.square().sum() + exact**2).item() / dim
    assert drawn.mean().item() == pytest.approx(exact, abs=4 * math.sqrt(variance_bound / 400))
    assert drawn.var().item() < 1.3 * variance_bound


def test_sketch_is_linear_and_its_log_norms_are_norms() -> None:
    sketch, delta = CountSketch(SIZES, dim=16), random_delta()
    doubled = {name: 2 * tensor for name, tensor in delta.items()}
    torch.testing.assert_close(sketch(doubled)[:, :16], 2 * sketch(delta)[:, :16])
    expected = torch.stack([delta[name].flatten(1).norm(dim=-1).log() for name in ("bias", "weight")], dim=-1)
    torch.testing.assert_close(sketch(delta)[:, 16:], expected)


def test_sketch_depends_on_seed_and_names_only() -> None:
    delta = random_delta()
    first = CountSketch(SIZES, dim=16, seed=5)(delta)
    reordered = CountSketch(dict(reversed(SIZES.items())), dim=16, seed=5)(dict(reversed(delta.items())))
    assert torch.equal(first, reordered)
    assert not torch.equal(first, CountSketch(SIZES, dim=16, seed=6)(delta))
    alone = CountSketch(SIZES, dim=16, seed=5)({name: tensor[1:2] for name, tensor in delta.items()})
    torch.testing.assert_close(alone, first[1:2])


def test_sketch_at_the_unedited_weights_has_a_finite_gradient() -> None:
    sketch = CountSketch(SIZES, dim=16)
    delta = {name: torch.zeros_like(t, requires_grad=True) for name, t in random_delta(dtype=torch.float32).items()}
    out_EP = sketch(delta)
    assert (out_EP[:, :16] == 0).all()
    assert out_EP[:, 16:].isfinite().all()
    for gradient in torch.autograd.grad(out_EP[:, 16:].sum(), list(delta.values())):
        assert (gradient == 0).all()


def test_sketch_upcasts_half_precision() -> None:
    delta = random_delta(dtype=torch.bfloat16)
    sketch = CountSketch(SIZES, dim=16)
    exact = sketch({name: tensor.double() for name, tensor in delta.items()})
    assert sketch(delta).dtype == flat_input(delta).dtype == torch.float32
    torch.testing.assert_close(sketch(delta).double(), exact, rtol=1e-5, atol=1e-5)


def test_sketch_uses_all_of_the_largest_dim() -> None:
    size = 4 * MAX_SKETCH_DIM
    out = CountSketch({"weight": size}, dim=MAX_SKETCH_DIM)({"weight": torch.ones(1, size)})
    assert out.shape == (1, MAX_SKETCH_DIM + 1)
    assert out[0, -100:].ne(0).any()


def test_sketch_refuses_what_it_was_not_made_for() -> None:
    with pytest.raises(ValueError, match=r"but the sketch was made for \{'bias': 7, 'weight': 40\}"):
        CountSketch(SIZES)({"weight": torch.zeros(1, 40)})
    with pytest.raises(ValueError, match="sketch_dim: got 40000, expected 1 to 16384"):
        CountSketch(SIZES, dim=40000)
    with pytest.raises(ValueError, match="expected at least one tensor"):
        CountSketch({})


# --- multiplier --------------------------------------------------------------------------------------------------


def test_features_attach_phi_only() -> None:
    phi_EP, risks_ER, gradients_EN = (torch.randn(E, width, requires_grad=True) for width in (4, 3, 2))
    features_EI = features(phi_EP, risks_ER, gradients_EN)
    torch.testing.assert_close(features_EI, torch.cat([phi_EP, risks_ER, gradients_EN.abs()], dim=-1))
    features_EI.sum().backward()
    assert phi_EP.grad is not None
    assert risks_ER.grad is None
    assert gradients_EN.grad is None


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_lambda_starts_at_its_initial_value_at_any_feature_scale(depth: int, scale: float) -> None:
    config = MultiplierConfig(depth=depth)
    for seed in range(10):
        features_EI = scale * torch.randn(E, 520, generator=torch.Generator().manual_seed(100 + seed))
        delta = MultiplierNetwork.init(config, 520, E, seed=seed)
        lambda_E = MultiplierNetwork.apply(config, delta, features_EI)
        assert lambda_E.shape == (E,)
        torch.testing.assert_close(lambda_E, torch.full((E,), config.initial), rtol=0.05, atol=0)


def test_every_edit_starts_equal_and_batched_equals_alone() -> None:
    config = MultiplierConfig(width=8)
    batched, alone = (MultiplierNetwork.init(config, 6, num_edits, seed=1) for num_edits in (E, 1))
    assert list(batched) == ["weight_0", "bias_0", "weight_1", "bias_1", "weight_2", "bias_2"]
    for name, tensor in batched.items():
        assert tensor.is_leaf
        assert tensor.requires_grad
        assert torch.equal(tensor, alone[name].expand_as(tensor))
    features_EI = torch.randn(E, 6)
    lambda_E = MultiplierNetwork.apply(config, batched, features_EI)
    for edit in range(E):
        single = MultiplierNetwork.apply(config, alone, features_EI[edit : edit + 1])
        torch.testing.assert_close(single, lambda_E[edit : edit + 1])
    gradients = torch.autograd.grad(lambda_E[0], list(batched.values()))
    assert all((gradient[1:] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("depth", [1, 3])
def test_multiplier_gradcheck(depth: int) -> None:
    config = MultiplierConfig(depth=depth, width=4)
    delta = MultiplierNetwork.init(config, 5, 2, seed=0)
    names = list(delta)

    def call(features_EI: Tensor, *weights: Tensor) -> Tensor:
        # lambda is about 1e-3: brought to a scale that finite differences can see.
        return 1e3 * MultiplierNetwork.apply(config, dict(zip(names, weights, strict=True)), features_EI)

    weights = [delta[name].detach().double().requires_grad_() for name in names]
    features_EI = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (features_EI, *weights))


def test_lambda_reaches_the_parameters_through_the_sketch() -> None:
    config, sketch = MultiplierConfig(width=8, sketch_dim=16), CountSketch(SIZES, dim=16)
    phi = {name: tensor.requires_grad_() for name, tensor in random_delta(dtype=torch.float32).items()}
    context = torch.ones(E, 3)
    delta = MultiplierNetwork.init(config, sketch.out_dim + 6, E, seed=0)
    lambda_E = MultiplierNetwork.apply(config, delta, features(sketch(phi), context, context))
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(lambda_E.sum(), list(phi.values())))


def test_detach_cuts_the_parameters_and_keeps_the_dual_gradient() -> None:
    config = MultiplierConfig(width=8, detach=True)
    delta = MultiplierNetwork.init(config, 6, E, seed=0)
    features_EI = torch.randn(E, 6, requires_grad=True)
    MultiplierNetwork.apply(config, delta, features_EI).sum().backward()
    assert features_EI.grad is None
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in delta.values())


def test_at_the_cap_the_value_stops_and_the_gradient_passes() -> None:
    config = MultiplierConfig(depth=1)
    delta = MultiplierNetwork.init(config, 6, E, seed=0)
    with torch.no_grad():
        delta["bias_0"].fill_(3.0)
    lambda_E = MultiplierNetwork.apply(config, delta, torch.zeros(E, 6))
    torch.testing.assert_close(lambda_E, torch.full((E,), config.cap))
    (gradient,) = torch.autograd.grad(lambda_E.sum(), delta["bias_0"])
    torch.testing.assert_close(gradient, torch.full((E, 1), torch.sigmoid(torch.tensor(3.0)).item()))


def test_dual_ascent_raises_lambda() -> None:
    config = MultiplierConfig(width=8)
    delta = MultiplierNetwork.init(config, 6, E, seed=0)
    features_EI, penalty_E = torch.randn(E, 6), torch.tensor([0.5, 1.0, 2.0])
    before_E = MultiplierNetwork.apply(config, delta, features_EI)
    gradients = torch.autograd.grad((before_E * penalty_E).sum(), list(delta.values()))
    stepped = {name: delta[name] + 0.1 * g for name, g in zip(delta, gradients, strict=True)}
    assert (MultiplierNetwork.apply(config, stepped, features_EI) > before_E).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "dense"}, "multiplier.input: got 'dense', expected one of sketch, flat"),
        ({"depth": 0}, "multiplier.depth: got 0, expected at least 1 layer"),
        ({"width": 0}, "multiplier.width: got 0"),
        ({"sketch_dim": 0}, "multiplier.sketch_dim: got 0, expected 1 to 16384"),
        ({"initial": 0.2}, r"multiplier.initial: got 0.2, expected 0 < initial < cap \(cap is 0.1\)"),
        ({"initial": math.nan}, "multiplier.initial: got nan"),
        ({"cap": math.inf}, "multiplier.cap: got inf"),
    ],
)
def test_config_refuses_bad_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MultiplierConfig(), **change)  # type: ignore[arg-type]


def test_the_cells_of_a_tensor_do_not_depend_on_what_follows() -> None:
    """An edit that is padded to a longer one is sketched as it is alone."""
    delta = torch.randn(2, 5, 300)
    padded = torch.cat([delta, torch.zeros(2, 7, 300)], dim=1)
    short, long = (CountSketch({"weight": x[0].numel()}, dim=64)({"weight": x}) for x in (delta, padded))
    torch.testing.assert_close(short, long, rtol=1e-6, atol=1e-6)
