"""ODEdit: the tripartite risk R_rel + R_loc + R_gen with the invariance penalty.

R_rel is the NLL of the edit's answer, R_loc the divergence from the unedited model on unrelated prompts, R_gen the
distance between the final states of the edit and of its rephrases. The penalty is computed from the derivative of each
environment's risk with respect to the scale of the final states; `odedit.editing.primal_dual` learns its multiplier.

References:
    arXiv 2601.19700: eq. 2-6 for the risks, eq. 9-11 for the penalty.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from odedit.inputs.batch import EDIT, REPHRASE_SLOTS, SUPERVISION_SLOTS, Answers, EditBatch, unnumbered
from odedit.objectives.base import ComparingConfig, Objective, Positions, require
from odedit.objectives.common.multiplier import MultiplierConfig
from odedit.objectives.common.penalty import FELT, Invariance
from odedit.objectives.common.several import Rephrases, agreement, combined
from odedit.objectives.common.terms import Forward
from odedit.risks import mmd
from odedit.risks.risks import Risk, upcast

Kernel = Literal["rbf", "linear", "contrastive"]


@dataclass(frozen=True)
class ODEditConfig(ComparingConfig):
    """Settings of ODEdit. Where the paper gives no value, the default is ours.

    Attributes:
        reliability_weight: Weight of R_rel, the NLL of the edit's answer; 0 leaves it out, also as an environment.
        locality_weight: Weight of R_loc, the divergence from the unedited model; 0 leaves it out, also as an
            environment.
        generality_weight: Weight of R_gen; 0 leaves it out, also as an environment.
        kernel: Distance in R_gen: `rbf` (MMD, eq. 4-6), `linear` (MMD), or `contrastive` (Table 4 of the paper).
        rephrases: Distance to several rephrases (`supervision.rephrases` of text and of image each). `single`: mean of
            the distances to each; `multiple`: distance to all states together (MMD-m). Against noisy rephrases, for
            single edits: `worst`: largest distance; `trimmed`: mean without the largest and the smallest quarter;
            `agreeing`: mean weighted by how far the edit moves their states in a common direction.
        bandwidths: Bandwidths sigma_q^2 of the RBF kernel, as multiples of sigma_0^2.
        sigma2_0: Base bandwidth sigma_0^2; null: measured on unedited states by `calibrate`.
        positions: Hidden states that R_gen compares: those that predict the `target`, or all of the prompt's `text`.
        environments: `regions` (one risk for each of IN, SE, OUT) or `prompts` (one NLL per prompt variant, and OUT).
        penalty: `adaptive` (lambda is learned), `fixed:<value>`, or `none`.
        warmup: Share of the steps without penalty.
        ramp: Share of the steps, after the warm-up, over which the penalty rises to its full weight.
        dual_rate: Learning rate gamma_2 of the multiplier network; the paper recommends 1e-3 to 5e-3.
        dual_schedule: `adaptive` divides the rate by (k + 1)^1.0001 and by the gradient's norm, as the IRM-TV code does
            (see `multiplier.normalisation` and `multiplier.counted`); or `constant`.
        multiplier: The network lambda(delta, phi_e).
    """

    generality_weight: Annotated[float, Ge(0)] = 1.0
    kernel: Kernel = "rbf"
    rephrases: Rephrases = "single"
    bandwidths: tuple[Annotated[float, Gt(0)], ...] = mmd.BANDWIDTH_MULTIPLIERS
    sigma2_0: Annotated[float, Gt(0)] | None = None
    positions: Positions = "target"
    environments: Literal["regions", "prompts"] = "regions"
    penalty: str = "adaptive"
    warmup: Annotated[float, Ge(0)] = 0.25
    ramp: Annotated[float, Ge(0)] = 0.10
    dual_rate: Annotated[float, Gt(0)] = 1e-3
    dual_schedule: Literal["adaptive", "constant"] = "adaptive"
    multiplier: MultiplierConfig = field(default_factory=MultiplierConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidths", tuple(self.bandwidths))
        super().__post_init__()
        require("warmup + ramp", self.warmup + self.ramp, self.warmup + self.ramp <= 1, "at most 1")
        require("bandwidths", self.bandwidths, len(self.bandwidths) > 0, "at least one number")
        self._fixed_multiplier()

    @property
    def weights(self) -> dict[str, float]:
        return super().weights | {"gen": self.generality_weight}

    @property
    def supervision_slots(self) -> tuple[str, ...]:
        return SUPERVISION_SLOTS[1:]

    @property
    def calibrated_positions(self) -> Positions | None:
        return self.positions if self.kernel == "rbf" and self.sigma2_0 is None else None

    @property
    def invariance(self) -> Invariance:
        return Invariance(
            self._fixed_multiplier(), self.warmup, self.ramp, self.dual_rate, self.dual_schedule, self.multiplier
        )

    @property
    def without_effect(self) -> dict[str, str]:
        if self._fixed_multiplier() is not None:
            reason = f"with 'penalty: {self.penalty}' lambda is not learned"
        elif (reach := self.invariance.reach) < FELT:
            reason = (
                f"lambda starts at {self.multiplier.weight * self.multiplier.initial:.2g} and stays near or below "
                f"{reach:.2g}, and the penalty changes edits from about {FELT} on; raise "
                "objective.multiplier.initial, with output_scale 1 and cap null"
            )
        else:
            return {}
        return dict.fromkeys(("dual_rate", "dual_schedule", "multiplier"), reason)

    def _fixed_multiplier(self) -> float | None:
        """Value of a fixed lambda; 0 without penalty, None if lambda is learned."""
        if self.penalty in ("none", "adaptive"):
            return 0.0 if self.penalty == "none" else None
        kind, _, value = self.penalty.partition(":")
        try:
            number = float(value) if kind == "fixed" else -1.0
        except ValueError:
            number = -1.0
        require("penalty", self.penalty, 0 <= number < float("inf"), "'adaptive', 'none' or 'fixed:<number >= 0>'")
        return number


class ODEdit(Objective):
    Config = ODEditConfig
    has_environments: ClassVar[bool] = True

    def __init__(self, config: ODEditConfig, sigma2_0: float | None = None) -> None:
        super().__init__(config, sigma2_0)
        base = config.sigma2_0 if config.sigma2_0 is not None else sigma2_0
        self._sigma2_Q: dict[torch.device, Tensor] = {}
        if config.kernel == "rbf":
            if base is None:
                raise ValueError("objective.sigma2_0 is not set: measure it with odedit.calibrate(...).")
            self._sigma2_Q[torch.device("cpu")] = mmd.bandwidths(float(base), config.bandwidths)

    def without_warmup(self) -> Objective:
        other = copy.copy(self)
        other.config = replace(self.config, warmup=0.0, ramp=0.0)
        return other

    @property
    def reads_text(self) -> bool:
        return bool(self.config.positions == "text")

    @property
    def reads_displacements(self) -> bool:
        return bool(self.config.rephrases == "agreeing")

    def likelihood_slots(self, batch: EditBatch) -> tuple[str, ...]:
        return (EDIT, *_rephrases(batch)) if self.config.environments == "prompts" else (EDIT,)

    def scale_gradients(self, forward: Forward, risks: Mapping[str, Risk]) -> dict[str, Tensor]:
        # A risk of weight 0 is no environment of the penalty.
        regions = {name: risk.scale_gradient for name, risk in risks.items() if self.config.weights[name]}
        if self.config.environments == "regions":
            return regions
        prompts = {slot: forward.likelihood(slot).scale_gradient for slot in _rephrases(forward.batch)}
        return {name: gradient for name, gradient in regions.items() if name != "gen"} | prompts

    def generality(self, forward: Forward) -> Risk:
        """R_gen: distance between the states of the edit and of its rephrases at `config.positions`."""
        batch = forward.batch
        if self.reads_text:
            states, mask = forward.hidden, batch.prompt_EKS & ~batch.image_EKS
        else:
            states, mask = forward.states_EKTD, batch.target_mask_EKT
        edit = batch.slots.index(EDIT)
        others = batch.answers(_rephrases(batch))
        x, x_mask = states[:, edit], mask[:, edit]
        y, y_mask = others.of(states), others.of(mask)
        unlike = None
        if self.config.kernel == "contrastive":
            negatives = batch.answers(self.compared_slots(batch))
            unlike = negatives.of(states), negatives.of(mask)
        if self.config.rephrases == "multiple":
            return self._distance(x, x_mask, y.flatten(1, 2), y_mask.flatten(1, 2), unlike)
        # Compare the edit with each of its K rephrases.
        x, x_mask = x.unsqueeze(1).expand_as(y), x_mask.unsqueeze(1).expand_as(y_mask)
        unlike = None if unlike is None else (unlike[0].unsqueeze(1), unlike[1].unsqueeze(1))
        distances = self._distance(x, x_mask, y, y_mask, unlike)
        agreement_EK = self._agreement(forward, others) if self.reads_displacements else None
        return combined(distances, others.present_EK, self.config.rephrases, agreement_EK)

    def _agreement(self, forward: Forward, rephrases: Answers) -> Tensor:
        assert forward.unedited is not None and forward.unedited.states_EKTD is not None, "kept by reads_displacements"
        moved_EKTD = upcast(forward.states_EKTD.detach()) - upcast(forward.unedited.states_EKTD)
        return agreement(rephrases.of(moved_EKTD), rephrases.mask_EKT)

    def _distance(
        self, x: Tensor, x_mask: Tensor, y: Tensor, y_mask: Tensor, unlike: tuple[Tensor, Tensor] | None
    ) -> Risk:
        """Distance between states x and states y by `config.kernel`.

        Args:
            unlike: States that must stay apart, `(..., K, T, D)`, and their mask; only for the `contrastive` kernel.
        """
        if unlike is not None:
            return mmd.contrastive(x, y, unlike[0], x_mask, y_mask, unlike[1])
        if self.config.kernel == "linear":
            return mmd.mmd2_linear(x, y, x_mask, y_mask)
        return mmd.mmd2_rbf(x, y, x_mask, y_mask, self._bandwidths(x.device))

    def _bandwidths(self, device: torch.device) -> Tensor:
        if device not in self._sigma2_Q:
            self._sigma2_Q[device] = self._sigma2_Q[torch.device("cpu")].to(device)
        return self._sigma2_Q[device]


def _rephrases(batch: EditBatch) -> tuple[str, ...]:
    """Slots of the batch's text and image rephrases."""
    return tuple(slot for slot in batch.slots if unnumbered(slot) in REPHRASE_SLOTS)


OBJECTIVE = ODEdit
