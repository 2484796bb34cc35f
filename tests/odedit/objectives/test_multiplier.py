"""The multiplier network and its input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from odedit.objectives.common.multiplier import MultiplierConfig, MultiplierNetwork, features
from odedit.objectives.common.sketch import CountSketch

E = 3
SIZES = {"weight": 40, "bias": 7}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


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
        # lambda is about 1e-3: scaled up for finite differences.
        return 1e3 * MultiplierNetwork.apply(config, dict(zip(names, weights, strict=True)), features_EI)

    weights = [delta[name].detach().double().requires_grad_() for name in names]
    features_EI = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (features_EI, *weights))


def test_lambda_reaches_the_parameters_through_the_sketch() -> None:
    config, sketch = MultiplierConfig(width=8, sketch_dim=16), CountSketch(SIZES, dim=16)
    phi = {name: torch.randn(E, size, requires_grad=True) for name, size in SIZES.items()}
    context = torch.ones(E, 3)
    delta = MultiplierNetwork.init(config, 16 + len(SIZES) + 6, E, seed=0)
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
        ({"input": "dense"}, "^input: got 'dense', expected 'sketch' or 'flat'"),
        ({"depth": 0}, "^depth: got 0, expected a whole number >= 1"),
        ({"width": 0}, "^width: got 0"),
        ({"sketch_dim": 0}, "^sketch_dim: got 0, expected a whole number >= 1 and <= 16384"),
        ({"initial": 0.2}, "^initial: got 0.2, expected less than cap, which is 0.1"),
        ({"initial": math.nan}, "^initial: got nan"),
        ({"cap": math.inf}, "^cap: got inf"),
    ],
)
def test_config_refuses_bad_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MultiplierConfig(), **change)  # type: ignore[arg-type]


def test_an_unscaled_output_starts_around_its_initial_value() -> None:
    """The draw of the last layer multiplies lambda: by a factor of 2 to 3 at scale 1, hardly at all at 0.01."""
    spreads = {}
    for scale in (1.0, 0.01):
        config = MultiplierConfig(initial=0.01, output_scale=scale, cap=None)
        first = [MultiplierNetwork.apply(config, MultiplierNetwork.init(config, 60, 1, seed), torch.randn(1, 60))
                 for seed in range(60)]  # fmt: skip
        logs = torch.cat(first).detach().log()
        assert float(logs.mean()) == pytest.approx(math.log(0.01), abs=0.3)
        spreads[scale] = float(logs.std())
    assert 0.5 < spreads[1.0] < 1.3
    assert spreads[0.01] == pytest.approx(0.01 * spreads[1.0], rel=0.2)


def test_weight_multiplies_lambda_beyond_its_cap_and_no_cap_is_softplus() -> None:
    features_EI = torch.randn(E, 6)
    plain = MultiplierConfig(width=8, initial=0.01, output_scale=1.0, cap=None)
    delta = MultiplierNetwork.init(plain, 6, E, seed=0)
    lambda_E = MultiplierNetwork.apply(plain, delta, features_EI)
    cap = float(lambda_E.detach().median())
    capped = dataclasses.replace(plain, initial=cap / 2, cap=cap, weight=200.0)
    torch.testing.assert_close(MultiplierNetwork.apply(capped, delta, features_EI), 200 * lambda_E.clamp(max=cap))
    assert lambda_E.max() > cap > lambda_E.min(), "on both sides of the cap"


def test_presets_are_complete_sets_and_the_first_is_the_default() -> None:
    names = {frozenset(values) for values in MultiplierConfig.PRESETS.values()}
    assert len(names) == 1
    assert MultiplierConfig.preset("ours") == MultiplierConfig()
    code = MultiplierConfig.preset("published_code", depth=2, weight=1.0)
    assert (code.depth, code.weight, code.cap, code.normalisation) == (2, 1.0, None, "per_tensor")
    delta = MultiplierNetwork.init(code, 6, 1, seed=0)
    assert float(delta["bias_1"].detach()) == pytest.approx(0.0, abs=1e-6), (
        "Softplus starts at log 2, as with a bias of 0"
    )
    with pytest.raises(ValueError, match="preset: got 'theirs', expected 'ours' or 'published_code'"):
        MultiplierConfig.preset("theirs")
    with pytest.raises(ValueError, match="every setting that it names is given as well"):
        MultiplierConfig.preset("published_code", **dataclasses.asdict(MultiplierConfig()))
