"""Risks and their scale gradients against autograd through an explicit w, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from odedit.risks.risks import Risk, locality, masked_mean, reliability, upcast
from odedit.risks.tokens import KL, NLL, Direction, Tokens, kl_of_states, token_risks

DIRECTIONS = ("edited_first", "base_first")
E, D, V = 3, 5, 11


def problem(tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Hidden states, a bias-free head, base logits, targets, and a mask of uneven lengths."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.tensor([tokens, max(1, tokens - 2), 1])
    return {
        "hidden_ETD": torch.randn(E, tokens, D, generator=generator, dtype=torch.float64).to(dtype),
        "head_DV": torch.randn(D, V, generator=generator, dtype=torch.float64).to(dtype),
        "base_ETV": 3 * torch.randn(E, tokens, V, generator=generator, dtype=torch.float64).to(dtype),
        "target_ET": torch.randint(V, (E, tokens), generator=generator),
        "mask_ET": torch.arange(tokens) < lengths[:, None],
    }


def risk_of(name: str, logits_ETV: Tensor, data: dict[str, Tensor]) -> Risk:
    if name == "reliability":
        return reliability(logits_ETV, data["target_ET"], data["mask_ET"])
    return locality(logits_ETV, data["base_ETV"], data["mask_ET"], direction=name)  # type: ignore[arg-type]


RISKS = ("reliability", *DIRECTIONS)


def plain_value(name: str, logits_ETV: Tensor, data: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
    """The risk by its definition, differentiable any number of times."""
    log_p, log_q = logits_ETV.log_softmax(-1), data["base_ETV"].log_softmax(-1)
    if name == "reliability":
        chosen = log_p.gather(-1, data["target_ET"][..., None]).squeeze(-1)
        values_ET = -(1 - label_smoothing) * chosen - label_smoothing * log_p.mean(-1)
    elif name == "edited_first":
        values_ET = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        values_ET = (log_q.exp() * (log_q - log_p)).sum(-1)
    return torch.where(data["mask_ET"], values_ET, 0.0).sum(-1) / data["mask_ET"].sum(-1)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", RISKS)
def test_scale_gradient_is_the_derivative_with_respect_to_w(name: str, tokens: int) -> None:
    data = problem(tokens)
    w_E = torch.ones(E, dtype=torch.float64, requires_grad=True)
    logits_ETV = (w_E[:, None, None] * data["hidden_ETD"]) @ data["head_DV"]
    risk = risk_of(name, logits_ETV, data)
    (expected_E,) = torch.autograd.grad(plain_value(name, logits_ETV, data).sum(), w_E)
    torch.testing.assert_close(risk.scale_gradient, expected_E, rtol=0, atol=1e-10)
    assert expected_E.abs().min() > 1e-4


@pytest.mark.parametrize("read", ["value", "scale_gradient", "both"])
@pytest.mark.parametrize("name", RISKS)
def test_closed_form_gradients_equal_autograd_and_double_backward(name: str, read: str) -> None:
    data = problem(4)
    hidden_ETD = data["hidden_ETD"].requires_grad_()
    w_E = torch.ones(E, dtype=torch.float64, requires_grad=True)
    value_E = plain_value(name, (w_E[:, None, None] * hidden_ETD) @ data["head_DV"], data)
    (slope_E,) = torch.autograd.grad(value_E.sum(), w_E, create_graph=True)
    closed = risk_of(name, hidden_ETD @ data["head_DV"], data)

    def objective(value: Tensor, slope: Tensor) -> Tensor:
        parts = {"value": value.exp(), "scale_gradient": slope.square(), "both": value.exp() + slope.square()}
        return parts[read].sum()

    (expected,) = torch.autograd.grad(objective(value_E, slope_E), hidden_ETD)
    (got,) = torch.autograd.grad(objective(*closed), hidden_ETD)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RISKS)
def test_a_second_derivative_is_refused_rather_than_incomplete(name: str) -> None:
    data = problem(4)
    hidden_ETD = data["hidden_ETD"].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(
            risk_of(name, hidden_ETD @ data["head_DV"], data).value.sum(), hidden_ETD, create_graph=True
        )


def test_label_smoothing_has_the_closed_form_gradient_too() -> None:
    data = problem(4)
    hidden_ETD = data["hidden_ETD"].requires_grad_()
    logits_ETV = hidden_ETD @ data["head_DV"]
    smoothed = reliability(logits_ETV, data["target_ET"], data["mask_ET"], 0.2)
    (expected,) = torch.autograd.grad(
        plain_value("reliability", logits_ETV, data, 0.2).sum(), hidden_ETD, retain_graph=True
    )
    (got,) = torch.autograd.grad(smoothed.value.sum(), hidden_ETD)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def target_nll(logits_ETV: Tensor, target_ET: Tensor) -> Tensor:
    """NLL that is kept beside the risk, as stop rules read it."""
    (tokens,) = token_risks(upcast(logits_ETV).flatten(0, 1).clone(), [NLL(target_ET.flatten())])
    return tokens.kept[:, 1].unflatten(0, target_ET.shape)


def test_values_against_torch() -> None:
    data = problem(4)
    logits_ETV = data["hidden_ETD"] @ data["head_DV"]
    mask_ET, log_p, log_q = data["mask_ET"], logits_ETV.log_softmax(-1), data["base_ETV"].log_softmax(-1)
    nll = torch.nn.functional.cross_entropy(logits_ETV.transpose(1, 2), data["target_ET"], reduction="none")
    forward_kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    backward_kl = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    for name, values_ET in (("reliability", nll), ("edited_first", forward_kl), ("base_first", backward_kl)):
        expected_E = torch.stack([row[keep].mean() for row, keep in zip(values_ET, mask_ET, strict=True)])
        torch.testing.assert_close(risk_of(name, logits_ETV, data).value, expected_E)
    torch.testing.assert_close(target_nll(logits_ETV, data["target_ET"]), nll)


def test_an_unedited_model_has_neither_divergence_nor_gradient() -> None:
    data = problem(4, torch.float32)
    logits_ETV = data["base_ETV"].clone().requires_grad_()
    for direction in DIRECTIONS:
        risk = locality(logits_ETV, data["base_ETV"], data["mask_ET"], direction)
        assert risk.value.abs().max() < 1e-6
        assert risk.scale_gradient.abs().max() < 1e-6
        (gradient,) = torch.autograd.grad(risk.value.sum(), logits_ETV)
        assert gradient.abs().max() < 1e-6


def test_the_base_is_a_constant() -> None:
    data = problem(2)
    base_ETV = data["base_ETV"].requires_grad_()
    logits_ETV = (data["hidden_ETD"] @ data["head_DV"]).requires_grad_()
    for direction in DIRECTIONS:
        value_E, slope_E = locality(logits_ETV, base_ETV, data["mask_ET"], direction)
        (value_E + slope_E).sum().backward()
    assert base_ETV.grad is None
    assert logits_ETV.grad is not None


def test_unknown_direction_is_refused() -> None:
    data = problem(1)
    with pytest.raises(ValueError, match="direction: got 'forward', expected one of edited_first, base_first"):
        locality(data["base_ETV"], data["base_ETV"], data["mask_ET"], "forward")  # type: ignore[arg-type]


@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("name", RISKS)
def test_padding_and_empty_rows_do_not_matter(name: str, fill: float) -> None:
    data = problem(4)
    data["mask_ET"][2] = False
    clean = risk_of(name, data["hidden_ETD"] @ data["head_DV"], data)
    padding_ET = ~data["mask_ET"]
    data["target_ET"] = data["target_ET"].masked_fill(padding_ET, -100)
    data["base_ETV"] = data["base_ETV"].masked_fill(padding_ET[..., None], fill)
    logits_ETV = (data["hidden_ETD"] @ data["head_DV"]).masked_fill(padding_ET[..., None], fill).requires_grad_()
    risk = risk_of(name, logits_ETV, data)
    assert risk.value[2] == 0
    assert risk.scale_gradient[2] == 0
    torch.testing.assert_close(risk, clean)
    (gradient,) = torch.autograd.grad(risk.value.sum() + risk.scale_gradient.square().sum(), logits_ETV)
    assert gradient.isfinite().all()
    assert (gradient[padding_ET] == 0).all()


def test_masked_mean_of_an_empty_row_is_zero_with_zero_gradient() -> None:
    values_ET = torch.tensor([[1.0, 2.0], [float("inf"), float("nan")]], requires_grad=True)
    mean_E = masked_mean(values_ET, torch.tensor([[True, True], [False, False]]))
    assert mean_E.tolist() == [1.5, 0.0]
    mean_E.sum().backward()
    assert values_ET.grad is not None
    assert values_ET.grad.tolist() == [[0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RISKS)
def test_half_precision_is_computed_in_float32(name: str, half: torch.dtype) -> None:
    data = problem(4)
    logits_ETV = (data["hidden_ETD"] @ data["head_DV"]).to(half)
    data["base_ETV"] = data["base_ETV"].to(half)
    risk = risk_of(name, logits_ETV, data)
    assert risk.value.dtype == risk.scale_gradient.dtype == torch.float32
    data["base_ETV"] = data["base_ETV"].double()
    torch.testing.assert_close(risk, Risk(*(x.float() for x in risk_of(name, logits_ETV.double(), data))))
    assert target_nll(logits_ETV, data["target_ET"]).dtype == torch.float32


@pytest.mark.parametrize("name", RISKS)
def test_leading_dimensions_are_free(name: str) -> None:
    data = problem(4)
    logits_ETV = data["hidden_ETD"] @ data["head_DV"]
    flat = risk_of(name, logits_ETV, data)
    nested = {key: value.unsqueeze(1) for key, value in data.items()}
    torch.testing.assert_close(risk_of(name, logits_ETV.unsqueeze(1), nested).value, flat.value.unsqueeze(1))
    alone = {key: value[0] if key != "head_DV" else value for key, value in data.items()}
    torch.testing.assert_close(risk_of(name, logits_ETV[0], alone).scale_gradient, flat.scale_gradient[0])


@pytest.mark.parametrize("kind", ["nll", *DIRECTIONS])
def test_a_gradient_in_place_is_the_same_and_taken_once(kind: str) -> None:
    data = problem(4)
    states_MD, log_q_MV = data["hidden_ETD"].flatten(0, 1), data["base_ETV"].flatten(0, 1).log_softmax(-1)
    target_M = data["target_ET"].flatten()
    gradients = []
    for once in (False, True):
        leaf_MD = states_MD.clone().requires_grad_()
        risk = NLL(target_M) if kind == "nll" else KL(log_q_MV, kind)  # type: ignore[arg-type]
        (tokens,) = token_risks(leaf_MD @ data["head_DV"], [risk], once)
        total = (tokens.value + 0.3 * tokens.scale_gradient.square()).sum()
        gradients.append(torch.autograd.grad(total, leaf_MD, retain_graph=True)[0])
        if once:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(total, leaf_MD)
        else:
            torch.testing.assert_close(torch.autograd.grad(total, leaf_MD)[0], gradients[0], rtol=0, atol=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("with_slope", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_of_states_in_parts_is_that_of_their_logits(direction: Direction, at_once: int, with_slope: bool) -> None:
    data = problem(4)
    states_MD, head = data["hidden_ETD"].flatten(0, 1), lambda states: states @ data["head_DV"]
    base_MD = states_MD + 0.1 * torch.randn(states_MD.shape, generator=torch.Generator().manual_seed(5))

    def shown(leaf_MD: Tensor, in_parts: bool) -> tuple[Tokens, Tensor]:
        if in_parts:
            tokens = kl_of_states(leaf_MD, base_MD, head, at_once, direction, with_slope)
        else:
            (tokens,) = token_risks(head(leaf_MD), [KL(head(base_MD).log_softmax(-1), direction)])
        total = (torch.arange(len(leaf_MD)) * tokens.value).sum()
        return tokens, torch.autograd.grad(total + tokens.scale_gradient.square().sum() * with_slope, leaf_MD)[0]

    whole, parts = (shown(states_MD.clone().requires_grad_(), in_parts) for in_parts in (False, True))
    torch.testing.assert_close(parts, whole)
    assert kl_of_states(states_MD, base_MD, head, at_once, direction).value.requires_grad is False
    leaf_MD = base_MD.clone().requires_grad_()
    same = kl_of_states(leaf_MD, base_MD, head, at_once, direction, with_slope)
    assert not same.value.any()
    (gradient,) = torch.autograd.grad(same.value.sum(), leaf_MD, create_graph=False)
    assert not gradient.any()
    with pytest.raises(RuntimeError, match="differentiable once"):
        again = kl_of_states(leaf_MD, base_MD, head, at_once, direction, with_slope)
        torch.autograd.grad(again.value.sum(), leaf_MD, create_graph=True)
