"""The primal-dual game against a plain implementation with torch.nn and torch.optim, one edit at a time.

Every combination of the multiplier's settings, among them both presets, is one game on a quadratic.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from odedit.editing.primal_dual import PrimalDual
from odedit.editors.base import OptimizerSettings
from odedit.objectives import ObjectiveConfig
from odedit.objectives.common.multiplier import MultiplierConfig, MultiplierNetwork
from odedit.objectives.common.penalty import penalty_schedule
from odedit.objectives.common.terms import TERMS, Terms
from tests.support.primal_dual import step

NUM_EDITS, STEPS, RATE, DUAL_RATE, SEED = 3, 9, 0.02, 0.05, 3
WARMUP, RAMP = 0.2, 0.3
TARGET = torch.linspace(-1, 1, 12).reshape(3, 4)
UNSCALED = {"initial": 0.1, "output_scale": 1.0, "cap": None}
GAMES = [
    MultiplierConfig.preset("ours", input="flat", width=8),
    MultiplierConfig.preset("published_code", input="flat", width=8),
    *(
        MultiplierConfig(
            input="flat", width=8, depth=2, normalisation=normalisation, counted=counted, gradient_at=at, **UNSCALED
        )
        for normalisation, counted, at in itertools.product(
            ("network", "per_tensor", "none"), ("dual", "all"), ("new", "old")
        )
    ),
]


class Editor:
    """The attributes of an editor that the optimiser reads."""

    frozen: frozenset[str] = frozenset()
    length_varies = False
    optimizer = OptimizerSettings("sgd", RATE)

    def constrain(self, params):
        return params


def risk_and_slope(weight: Tensor, edit: int) -> tuple[Tensor, Tensor]:
    """A quadratic whose minimum differs per edit, and the scale gradient of its only environment."""
    return ((weight.flatten() - TARGET[edit]) ** 2).sum() * (edit + 1), weight.sum() + 0.3


def batched(config: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor], list[list[float]]]:
    """Weights, networks and lambda of every step, by `odedit`."""
    optimizer = PrimalDual(Editor(), config, STEPS, seed=SEED)
    origin = {"weight": torch.zeros(NUM_EDITS, 2, 2)}
    params = {"weight": origin["weight"].clone().requires_grad_()}
    state, curves = optimizer.init(params), []
    for number in range(STEPS + 1):
        pairs = [risk_and_slope(params["weight"][edit], edit) for edit in range(NUM_EDITS)]
        risk_E, slope_E = (torch.stack(values) for values in zip(*pairs, strict=True))
        terms = Terms(
            risks={name: risk_E if name == "rel" else torch.zeros(NUM_EDITS) for name in TERMS},
            total=risk_E,
            scale_gradients={"rel": slope_E},
            penalty=slope_E.square(),
            worst_nll=risk_E.detach(),
            worst_trained_nll=risk_E.detach(),
            all_right=torch.zeros(NUM_EDITS, dtype=torch.bool),
        )
        active = torch.full((NUM_EDITS,), number < STEPS)
        params, state, log = step(optimizer, params, origin, state, terms, active)
        curves.append(log["lambda"].tolist())
    return params["weight"].detach(), state.delta, curves


class Game:
    """One edit: a module for lambda, and two optimisers of torch."""

    def __init__(self, config: ObjectiveConfig, edit: int) -> None:
        self.config, self.edit = config, edit
        self.weight = torch.zeros(2, 2, requires_grad=True)
        first = MultiplierNetwork.init(config.multiplier, 4 + len(TERMS) + 1, 1, SEED)
        layers: list[nn.Module] = []
        for index in range(config.multiplier.depth):
            matrix = first[f"weight_{index}"].detach()[0]
            linear = nn.Linear(*matrix.shape)
            linear.weight.data, linear.bias.data = matrix.T.clone(), first[f"bias_{index}"].detach()[0].clone()
            layers += [linear, nn.Softplus()]
        self.network = nn.Sequential(*layers)
        self.primal = torch.optim.SGD([self.weight], lr=RATE)
        self.dual = torch.optim.SGD([{"params": [p]} for p in self.network.parameters()], lr=0.0, maximize=True)
        self.dual_steps = 0

    def multiplier(self) -> Tensor:
        risk, slope = risk_and_slope(self.weight, self.edit)
        context = torch.stack([risk.detach(), *[torch.zeros(())] * (len(TERMS) - 1), slope.detach().abs()])
        x = torch.cat([self.weight.flatten(), context])
        value = self.network(x / (1 + x.square().mean()).sqrt()).squeeze()
        cap = self.config.multiplier.cap
        return self.config.multiplier.weight * (value if cap is None else value.clamp(max=cap))

    def ascend(self, number: int) -> None:
        """One dual step at the present weight, for the primal step with this number."""
        settings = self.config.multiplier
        weight = penalty_schedule(number, STEPS, WARMUP, RAMP)
        if weight == 0:
            return
        self.dual.zero_grad()
        _, slope = risk_and_slope(self.weight, self.edit)
        (weight * self.multiplier() * slope.detach() ** 2).backward(inputs=list(self.network.parameters()))
        gradients = [p.grad for p in self.network.parameters()]
        whole = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        count = number if settings.counted == "all" else self.dual_steps
        for group, gradient in zip(self.dual.param_groups, gradients, strict=True):
            norm = {"network": whole, "per_tensor": gradient.norm(), "none": torch.ones(())}[settings.normalisation]
            group["lr"] = float(DUAL_RATE / ((count + 1) ** 1.0001 * norm))
        self.dual.step()
        self.dual_steps += 1

    def play(self) -> list[float]:
        """lambda before every primal step and at the end."""
        shown = []
        for number in range(STEPS + 1):
            weight = penalty_schedule(number, STEPS, WARMUP, RAMP)
            value = self.multiplier()
            shown.append(weight * float(value.detach()))
            if number == STEPS:
                break
            risk, slope = risk_and_slope(self.weight, self.edit)
            (gradient,) = torch.autograd.grad(risk + weight * value * slope**2, self.weight)
            if self.config.multiplier.gradient_at == "old":
                self.ascend(number)
            self.weight.grad = gradient
            self.primal.step()
            # The dual step after the last primal step would change nothing any more, and is not taken.
            if self.config.multiplier.gradient_at == "new" and number < STEPS - 1:
                self.ascend(number)
        return shown


@pytest.mark.parametrize(
    "multiplier", GAMES, ids=lambda c: f"{c.initial:.2g}-{c.normalisation}-{c.counted}-{c.gradient_at}"
)
def test_the_game_is_that_of_torch(multiplier):
    config = ObjectiveConfig(warmup=WARMUP, ramp=RAMP, dual_rate=DUAL_RATE, multiplier=multiplier)
    weights, delta, curves = batched(config)
    for edit in range(NUM_EDITS):
        game = Game(config, edit)
        shown = game.play()
        assert [step[edit] for step in curves] == pytest.approx(shown, rel=1e-4, abs=1e-7)
        torch.testing.assert_close(weights[edit], game.weight.detach(), rtol=1e-4, atol=1e-6)
        for index, layer in enumerate(game.network[::2]):
            torch.testing.assert_close(delta[f"weight_{index}"][edit].detach(), layer.weight.T, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(delta[f"bias_{index}"][edit].detach(), layer.bias, rtol=1e-4, atol=1e-6)


def test_the_settings_of_the_dual_step_make_different_games():
    """Without this, the test above could compare settings that are never read."""
    ends = [tuple(batched(ObjectiveConfig(warmup=WARMUP, ramp=RAMP, dual_rate=DUAL_RATE, multiplier=game))[2][-1])
            for game in GAMES]  # fmt: skip
    assert len(set(ends)) == len(GAMES)
