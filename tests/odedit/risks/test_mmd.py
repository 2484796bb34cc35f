"""MMD and contrastive risks against literal pairwise sums and autograd through an explicit w, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from odedit.risks.mmd import (
    BANDWIDTH_MULTIPLIERS,
    bandwidths,
    contrastive,
    mean_squared_distance,
    mmd2_linear,
    mmd2_rbf,
)
from odedit.risks.risks import Risk

E, D, K = 3, 6, 2
SIGMA2_Q = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
SHAPES = [(1, 1), (1, 3), (4, 3)]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def clouds(tokens: int, others: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * tokens + others)

    def mask(size: int, *lengths: int) -> Tensor:
        return torch.arange(size) < torch.tensor([min(size, length) for length in lengths])[:, None]

    return {
        "x_ETD": torch.randn(E, tokens, D, generator=generator, dtype=torch.float64).to(dtype),
        "y_ESD": (torch.randn(E, others, D, generator=generator, dtype=torch.float64) + 0.5).to(dtype),
        "negatives_EKSD": torch.randn(E, K, others, D, generator=generator, dtype=torch.float64).to(dtype),
        "x_mask_ET": mask(tokens, tokens, 2, 1),
        "y_mask_ES": mask(others, others, 1, 2),
        "negatives_mask_EKS": mask(others, others, 1, 2).unsqueeze(1).repeat(1, K, 1),
    }


def rbf(data: dict[str, Tensor]) -> Risk:
    return mmd2_rbf(data["x_ETD"], data["y_ESD"], data["x_mask_ET"], data["y_mask_ES"], SIGMA2_Q)


def linear(data: dict[str, Tensor]) -> Risk:
    return mmd2_linear(data["x_ETD"], data["y_ESD"], data["x_mask_ET"], data["y_mask_ES"])


def info_nce(data: dict[str, Tensor]) -> Risk:
    return contrastive(**data)


STATES = ("x_ETD", "y_ESD", "negatives_EKSD")
RISKS = pytest.mark.parametrize("risk_of", [rbf, linear, info_nce])
RiskOf = Callable[[dict[str, Tensor]], Risk]


def scaled(data: dict[str, Tensor], w_E: Tensor) -> dict[str, Tensor]:
    return data | {name: data[name] * w_E.view(-1, *[1] * (data[name].ndim - 1)) for name in STATES}


def naive_mmd2(x_TD: Tensor, y_SD: Tensor, sigma2_Q: Tensor) -> Tensor:
    def mean_kernel(a_ID: Tensor, b_JD: Tensor) -> Tensor:
        squared = [[(a - b).square().sum() for b in b_JD] for a in a_ID]
        return torch.stack([torch.exp(-d / (2 * sigma2_Q)).sum() for row in squared for d in row]).mean()

    return mean_kernel(x_TD, x_TD) + mean_kernel(y_SD, y_SD) - 2 * mean_kernel(x_TD, y_SD)


@pytest.mark.parametrize(("tokens", "others"), SHAPES)
def test_rbf_equals_the_literal_sum_over_pairs(tokens: int, others: int) -> None:
    data = clouds(tokens, others)
    expected = [
        naive_mmd2(data["x_ETD"][e][data["x_mask_ET"][e]], data["y_ESD"][e][data["y_mask_ES"][e]], SIGMA2_Q)
        for e in range(E)
    ]
    torch.testing.assert_close(rbf(data).value, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tokens", "others"), SHAPES)
@RISKS
def test_scale_gradient_is_the_derivative_with_respect_to_w(risk_of: RiskOf, tokens: int, others: int) -> None:
    data = clouds(tokens, others)
    w_E = torch.ones(E, dtype=torch.float64, requires_grad=True)
    (expected_E,) = torch.autograd.grad(risk_of(scaled(data, w_E)).value.sum(), w_E, create_graph=True)
    torch.testing.assert_close(risk_of(data).scale_gradient, expected_E, rtol=0, atol=1e-10)


@RISKS
def test_gradient_of_the_scale_gradient_equals_double_backward(risk_of: RiskOf) -> None:
    data = clouds(4, 3)
    data["x_ETD"].requires_grad_()
    w_E = torch.ones(E, dtype=torch.float64, requires_grad=True)
    (slope_E,) = torch.autograd.grad(risk_of(scaled(data, w_E)).value.sum(), w_E, create_graph=True)
    (expected,) = torch.autograd.grad(slope_E.square().sum(), data["x_ETD"])
    closed_E = risk_of(data).scale_gradient
    if not closed_E.requires_grad:  # the contrastive risk: exactly 0, a constant
        assert expected.abs().max() < 1e-10
        return
    (got,) = torch.autograd.grad(closed_E.square().sum(), data["x_ETD"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_bandwidth_measured_on_the_pair_makes_the_risk_constant() -> None:
    """Sigma must be a constant: measured on one token a side, d^2 / sigma^2 does not depend on d."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    x_ETD = torch.randn(1, 1, D, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(1, 1, D, dtype=torch.float64), dim=-1)
    multipliers_Q = torch.tensor(BANDWIDTH_MULTIPLIERS, dtype=torch.float64)
    own, fixed = [], []
    for distance in (0.1, 1.0, 10.0):
        y_ESD = x_ETD + distance * direction
        sigma2_own = mean_squared_distance(torch.cat([x_ETD[0], y_ESD[0]]))
        own.append(mmd2_rbf(x_ETD, y_ESD, mask, mask, sigma2_own * multipliers_Q).value.item())
        fixed.append(mmd2_rbf(x_ETD, y_ESD, mask, mask, SIGMA2_Q).value.item())
    assert own == pytest.approx([own[0]] * 3, rel=1e-9)
    assert fixed[0] < 0.02 < 0.2 < fixed[1] < fixed[2]

    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    pair_2D = w * torch.stack([x_ETD[0, 0], y_ESD[0, 0]])
    sigma2_Q = mean_squared_distance(pair_2D) * multipliers_Q
    (slope,) = torch.autograd.grad(naive_mmd2(pair_2D[:1], pair_2D[1:], sigma2_Q), w)
    assert abs(slope.item()) < 1e-12


def test_equal_clouds_have_no_risk_and_finite_gradients() -> None:
    data = clouds(4, 4, torch.float32)
    data["y_ESD"], data["y_mask_ES"] = data["x_ETD"], data["x_mask_ET"]
    data["x_ETD"] = data["x_ETD"].clone().requires_grad_()
    for risk in (rbf(data), linear(data)):
        assert risk.value.abs().max() < 1e-5
        assert risk.scale_gradient.abs().max() < 1e-5
        (gradient,) = torch.autograd.grad(risk.value.sum(), data["x_ETD"])
        assert gradient.abs().max() < 1e-5


def test_float32_keeps_small_distances_between_large_states() -> None:
    """Without centring, distances from the Gram matrix of states far from 0 would be lost to cancellation."""
    data = clouds(4, 3)
    near = data | {name: data[name] + 1000.0 for name in ("x_ETD", "y_ESD")}
    expected = rbf(near)
    single = rbf({name: value.float() if value.is_floating_point() else value for name, value in near.items()})
    torch.testing.assert_close(Risk(*(x.double() for x in single)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("empty_side", ["x_mask_ET", "y_mask_ES"])
@RISKS
def test_padding_and_empty_rows_do_not_matter(risk_of: RiskOf, empty_side: str, fill: float) -> None:
    data = clouds(4, 3)
    data[empty_side][2] = False
    clean = risk_of(data)
    dirty = dict(data)
    for states, mask in zip(STATES, ("x_mask_ET", "y_mask_ES", "negatives_mask_EKS"), strict=True):
        dirty[states] = data[states].masked_fill(~data[mask].unsqueeze(-1), fill).requires_grad_()
    risk = risk_of(dirty)
    torch.testing.assert_close(risk, clean)
    assert risk.value[2] == 0
    assert risk.scale_gradient[2] == 0
    used = [dirty[name] for name in STATES]
    total = risk.value.sum() + risk.scale_gradient.square().sum()
    for gradient in torch.autograd.grad(total, used, allow_unused=True):
        if gradient is not None:
            assert gradient.isfinite().all()
            assert (gradient[2] == 0).all()


def test_several_rephrases_are_one_longer_cloud() -> None:
    data = clouds(4, 3)
    other_ESD, other_mask_ES = data["y_ESD"] + 1, data["y_mask_ES"]
    joined = data | {
        "y_ESD": torch.cat([data["y_ESD"], other_ESD], dim=1),
        "y_mask_ES": torch.cat([data["y_mask_ES"], other_mask_ES], dim=1),
    }
    both_SD = torch.cat([data["y_ESD"][0], other_ESD[0]])
    torch.testing.assert_close(rbf(joined).value[0], naive_mmd2(data["x_ETD"][0], both_SD, SIGMA2_Q))


@RISKS
def test_an_edit_does_not_depend_on_its_batch_mates(risk_of: RiskOf) -> None:
    data = clouds(4, 3)
    batched = risk_of(data)
    for edit in range(E):
        alone = risk_of({name: value[edit : edit + 1] for name, value in data.items()})
        torch.testing.assert_close(alone, Risk(*(x[edit : edit + 1] for x in batched)))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@RISKS
def test_half_precision_is_computed_in_float32(risk_of: RiskOf, half: torch.dtype) -> None:
    data = clouds(4, 3, half)
    exact = risk_of({name: value.double() if value.is_floating_point() else value for name, value in data.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        risk = risk_of(data)
    assert risk.value.dtype == risk.scale_gradient.dtype == torch.float32
    torch.testing.assert_close(Risk(*(x.double() for x in risk)), exact, rtol=1e-5, atol=1e-5)


def test_contrastive_against_cross_entropy() -> None:
    data = clouds(1, 1)
    x_ED, y_ED, negatives_EKD = data["x_ETD"][:, 0], data["y_ESD"][:, 0], data["negatives_EKSD"][:, :, 0]
    cosine = torch.nn.functional.cosine_similarity
    similarity = torch.cat([cosine(x_ED, y_ED)[:, None], cosine(x_ED[:, None], negatives_EKD, dim=-1)], dim=1)
    expected_E = torch.nn.functional.cross_entropy(similarity / 0.1, torch.zeros(E).long(), reduction="none")
    torch.testing.assert_close(info_nce(data).value, expected_E)


def test_contrastive_without_negatives_is_zero() -> None:
    data = clouds(4, 3)
    data["x_ETD"].requires_grad_()
    data["negatives_mask_EKS"] = torch.zeros_like(data["negatives_mask_EKS"])
    risk = info_nce(data)
    assert risk.value.tolist() == [0.0] * E
    (gradient,) = torch.autograd.grad(risk.value.sum(), data["x_ETD"])
    assert (gradient == 0).all()


def test_mean_squared_distance_over_all_pairs() -> None:
    states_ND = torch.randn(20, D, dtype=torch.float64) + 3
    expected = torch.nn.functional.pdist(states_ND).square().mean()
    torch.testing.assert_close(mean_squared_distance(states_ND), expected)
    assert mean_squared_distance(states_ND.half()).dtype == torch.float32


def test_bandwidths() -> None:
    torch.testing.assert_close(bandwidths(torch.tensor(8.0)), torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_squared_distance(torch.zeros(1, D)), "got 1 of them, expected at least 2"),
        (lambda: bandwidths(0.0), "sigma2_0: got 0.0, expected a positive finite number"),
        (lambda: bandwidths(float("nan")), "sigma2_0: got nan"),
        (lambda: bandwidths(1.0, []), "multipliers: got"),
        (lambda: bandwidths(1.0, [1.0, -1.0]), "multipliers: got"),
        (lambda: contrastive(**clouds(1, 1), temperature=0.0), "temperature: got 0.0, expected a positive number"),
    ],
)
def test_bad_values_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
