"""The invariance penalty against double backward, in float64, and its schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from odedit.objectives.common.dual_step import ascended
from odedit.objectives.common.multiplier import MultiplierConfig, MultiplierNetwork
from odedit.objectives.common.penalty import Invariance, penalty_schedule, tv_penalty
from odedit.risks.mmd import mmd2_rbf
from odedit.risks.risks import locality, reliability

E = 3


def test_opposite_gradients_do_not_cancel() -> None:
    gradient_E = torch.tensor([2.0, -1.0], requires_grad=True)
    penalty_E = tv_penalty([gradient_E, -gradient_E])
    assert penalty_E.tolist() == [16.0, 4.0]
    penalty_E.sum().backward()
    assert gradient_E.grad is not None
    assert gradient_E.grad.tolist() == [16.0, -8.0]


def test_no_gradient_where_every_environment_is_invariant() -> None:
    gradients_EN = torch.zeros(2, 3, requires_grad=True)
    tv_penalty(gradients_EN.unbind(1)).sum().backward()
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
    """The same risks by their definitions, which autograd differentiates twice."""
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


@pytest.mark.parametrize("rate", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize(("initial", "width", "scale"), [(1e-3, 64, 0.01), (0.01, 16, 0.01), (0.1, 64, 1.0)])
def test_the_reach_bounds_lambda_after_twenty_dual_steps(rate: float, initial: float, width: int, scale: float) -> None:
    """Twenty steps of ascent, nothing against them, from the network's own start."""
    multiplier = MultiplierConfig(initial=initial, width=width, output_scale=scale, cap=None)
    settings = Invariance(None, dual_rate=rate, multiplier=multiplier)
    features_EI = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    delta = MultiplierNetwork.init(multiplier, 40, 1, seed=0)
    first = float(MultiplierNetwork.apply(multiplier, delta, features_EI).detach())
    for step in range(20):
        gain = MultiplierNetwork.apply(multiplier, delta, features_EI).sum()
        moved = ascended(settings, delta, gain, torch.tensor([float(step + 1)]))
        delta = {name: value.requires_grad_() for name, value in moved.items()}
    last = float(MultiplierNetwork.apply(multiplier, delta, features_EI).detach())
    assert first < last < 1.05 * settings.reach * first / initial
    assert Invariance(None, dual_rate=rate, multiplier=replace(multiplier, cap=2 * initial)).reach <= 2 * initial


def test_the_reach_of_other_multipliers() -> None:
    assert (Invariance(0.5).reach, Invariance(0.0).reach) == (0.5, 0.0)
    assert Invariance(None, dual_schedule="constant").reach == 0.1
    assert Invariance(None, multiplier=MultiplierConfig(cap=None, normalisation="none")).reach == math.inf
    assert Invariance(None, multiplier=MultiplierConfig.preset("published_code")).reach > 100
