"""The objective as named terms of every edit; nothing moves here.

`native` is the base editor's own loss: the likelihood of the edit and the method's own terms. `native_kl` adds R_loc to
it and nothing else: what a comparison needs to tell what the rest of the objective adds. `odedit` is the
tripartite risk of arXiv 2601.19700 (eq. 2-6) with the invariance penalty (eq. 9-11); its multiplier belongs to
`primal_dual`. `contrast` is ours: the same three regions by what is measured in each,

    G = NLL(edit) + w_gen NLL(rephrase) + w_loc sum_k v_k KL(p_k || q_k),     v_k = 2 (1 - q_k(o)),

over one rephrase that asks in other words about another picture (`EditRequest.rephrase`), and hard negatives (see
`odedit.negatives`), some of them in each step, all in turn. o is the answer that the edit replaces: a picture that the
unedited model answers alike shows the same thing. q_k(o) is the probability of the whole answer, near 0 for a long one
whatever the picture shows. An edit stops when the least likely answer token of edit *and* rephrase has come below the
threshold.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from odedit import mmd, risks
from odedit.backbones import encode_requests
from odedit.backbones.base import Backbone
from odedit.editors.base import Editor, Trace
from odedit.edits import (
    EDIT,
    LOCALITY_SLOTS,
    REPHRASE,
    REPHRASE_SLOTS,
    SUPERVISION_SLOTS,
    Answers,
    EditBatch,
    EditParams,
    EditRequest,
    is_locality,
    is_negative,
)
from odedit.errors import InputError
from odedit.irm_tv import MultiplierConfig, tv_penalty
from odedit.prompts import Template
from odedit.risks import Risk
from odedit.selecting import gather_positions
from odedit.token_risks import KL, NLL, TokenRisk, Tokens, kl_of_states, token_risks

Name = Literal["native", "native_kl", "odedit", "contrast"]
Kernel = Literal["rbf", "linear", "contrastive"]
CALIBRATION_STATES = 256
_TOKENS_KEPT = 1024
"""Most tokens whose unedited distributions over the vocabulary are kept from step to step."""
_VALUES_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
"""Logits that the head makes at a time where they are not kept: rows enough for a fast product, and no more."""
_LOCALITY = "locality"
_NEGATIVE_WEIGHT = 2.0
"""Of a negative, beside an NLL; chosen on the validation split of the embedded world."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What an edit is trained with. The paper states no value for most of these; the defaults are ours.

    Attributes:
        name: `native` (the base editor's loss), `native_kl` (the same and R_loc), `odedit`, or `contrast`.
        reliability_weight, locality_weight, generality_weight: Of R_rel, R_loc, R_gen; 0 drops a term, also from the
            environments of the penalty.
        own_weight: Of the editor's own terms; None: 0 under `odedit` and `contrast`, which replace them, else 1.
        negatives: Hard negatives of an edit, under `contrast`.
        negatives_at_once: How many of them a step sees.
        locality_direction: `edited_first`, KL(edited || base) as in the paper's eq. 3, or `base_first`.
        kernel: Of R_gen: `rbf` (MMD, eq. 4-6), `linear` (MMD), or `contrastive` (the paper's Table 4).
        rephrases: `single` compares the edit with each rephrase by itself and averages; `multiple` pools them (MMD-m).
        bandwidths: sigma_q^2 as multiples of sigma_0^2.
        sigma2_0: The base bandwidth; None: measured on unedited states by `calibrate`.
        positions: Hidden states compared by R_gen: those that predict the `target`, or all of the prompt's `text`.
        environments: `regions` (one risk for each of IN, SE, OUT) or `prompts` (one NLL per prompt variant, and OUT).
        penalty: `adaptive` (lambda is learned), `fixed:<value>`, or `none`.
        warmup, ramp: Shares of the steps without penalty, and until it has full weight.
        dual_rate: gamma_2, the IRM-TV learning rate; the paper's sweet spot is 1e-3 to 5e-3.
        dual_schedule: `adaptive` divides it by |g| (k + 1)^1.0001 as the IRM-TV code does; or `constant`.
        multiplier: The network lambda(delta, phi_e).
    """

    name: Name = "odedit"
    reliability_weight: float = 1.0
    locality_weight: float = 1.0
    generality_weight: float = 1.0
    own_weight: float | None = None
    negatives: int = 12
    negatives_at_once: int = 2
    locality_direction: risks.Direction = "edited_first"
    kernel: Kernel = "rbf"
    rephrases: Literal["single", "multiple"] = "single"
    bandwidths: tuple[float, ...] = mmd.BANDWIDTH_MULTIPLIERS
    sigma2_0: float | None = None
    positions: Literal["target", "text"] = "target"
    environments: Literal["regions", "prompts"] = "regions"
    penalty: str = "adaptive"
    warmup: float = 0.25
    ramp: float = 0.10
    dual_rate: float = 1e-3
    dual_schedule: Literal["adaptive", "constant"] = "adaptive"
    multiplier: MultiplierConfig = field(default_factory=MultiplierConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidths", tuple(self.bandwidths))
        for name in ("reliability_weight", "locality_weight", "generality_weight", "warmup", "ramp"):
            value = getattr(self, name)
            _require(name, value, value >= 0, "a number >= 0")
        _require("name", self.name, self.name in get_args(Name), f"one of {', '.join(get_args(Name))}")
        _require("kernel", self.kernel, self.kernel in get_args(Kernel), f"one of {', '.join(get_args(Kernel))}")
        trained = self.reliability_weight or self.locality_weight or self.generality_weight
        _require("reliability_weight", self.reliability_weight, bool(trained), "not all three risks without weight")
        _require("dual_rate", self.dual_rate, self.dual_rate > 0, "a number > 0")
        _require("warmup + ramp", self.warmup + self.ramp, self.warmup + self.ramp <= 1, "at most 1")
        _require("bandwidths", self.bandwidths, all(b > 0 for b in self.bandwidths), "numbers > 0")
        _require("bandwidths", self.bandwidths, len(self.bandwidths) > 0, "at least one number")
        _require("sigma2_0", self.sigma2_0, self.sigma2_0 is None or self.sigma2_0 > 0, "a number > 0 or null")
        _require("negatives_at_once", self.negatives_at_once, self.negatives_at_once >= 1, "at least 1")
        fits = self.negatives >= self.negatives_at_once
        _require("negatives", self.negatives, fits, f"at least negatives_at_once ({self.negatives_at_once})")
        self.fixed_multiplier()

    def check(self, editor: Editor) -> None:
        """Raises InputError if the editor's edits are nothing that lambda could read, or need the same sequences in
        every step where they take turns.
        """
        if self.takes_turns and editor.length_varies:
            raise InputError(
                "objective.name: 'contrast' shows an edit other pictures in each step, but with these settings the "
                "editor keeps what it was shown in the first one; give it a clamp or a mask of entries, or set "
                "objective.negatives to objective.negatives_at_once."
            )
        if self.fixed_multiplier() is None and self.multiplier.input == "flat" and editor.length_varies:
            raise InputError(
                "objective.multiplier.input: got 'flat', but with these settings of the editor an edit is as long as "
                "its batch's sequences; use 'sketch'."
            )

    def fixed_multiplier(self) -> float | None:
        """The value of a fixed lambda, 0 for no penalty, None if lambda is learned."""
        if self.name != "odedit" or self.penalty == "none":
            return 0.0
        if self.penalty == "adaptive":
            return None
        kind, _, value = self.penalty.partition(":")
        try:
            number = float(value) if kind == "fixed" else -1.0
        except ValueError:
            number = -1.0
        _require("penalty", self.penalty, 0 <= number < float("inf"), "'adaptive', 'none' or 'fixed:<number >= 0>'")
        return number

    @property
    def effective_own_weight(self) -> float:
        if self.own_weight is not None:
            return self.own_weight
        return 0.0 if self.name in ("odedit", "contrast") else 1.0

    @property
    def takes_turns(self) -> bool:
        """Whether a step sees some of the negatives only."""
        return self.name == "contrast" and self.negatives > self.negatives_at_once

    @property
    def weights(self) -> dict[str, float]:
        """Of every term that can be part of the objective, by its name in `Terms.risks`."""
        return {
            "rel": self.reliability_weight,
            "loc": self.locality_weight,
            "gen": self.generality_weight,
            "own": self.effective_own_weight,
        }

    @property
    def needs_bandwidth(self) -> bool:
        """Whether sigma_0^2 must be known before the first step."""
        return self.name == "odedit" and self.kernel == "rbf"


def _require(name: str, got: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got!r}, expected {allowed}.")


@dataclass(frozen=True)
class Terms:
    """Everything the objective says about E edits at one phi_e; every tensor is `(E,)`.

    Attributes:
        risks: `rel`, `loc`, `gen`, `own`, unweighted.
        total: Their weighted sum: G without the penalty.
        scale_gradients: One per environment, by name.
        penalty: `( sum |g| )^2` over the environments.
        worst_nll: Largest NLL among the edit's target tokens.
        worst_trained_nll: The same, of all answers whose likelihood the objective trains.
        all_right: Whether every target token of the edit is the model's first choice.
    """

    risks: dict[str, Tensor]
    total: Tensor
    scale_gradients: dict[str, Tensor]
    penalty: Tensor
    worst_nll: Tensor
    worst_trained_nll: Tensor
    all_right: Tensor


@dataclass(frozen=True)
class Unedited:
    """What R_loc compares with: the unedited model at the M tokens of the locality prompts' answers.

    Attributes:
        states_MD: Final hidden states.
        log_q_MV: Log-probabilities; None where so many would not fit or are read only once: then they are computed from
            the states each time, some at a time.
        weight_EK: What each sequence of the batch weighs in R_loc; None: all alike.
    """

    states_MD: Tensor
    log_q_MV: Tensor | None = None
    weight_EK: Tensor | None = None


class Objective:
    """Computes `Terms`; holds settings and the bandwidths, no state."""

    def __init__(self, config: ObjectiveConfig, sigma2_0: float | None = None) -> None:
        """Raises ValueError if the kernel needs a bandwidth and neither the settings nor the caller give one."""
        self.config = config
        base = config.sigma2_0 if config.sigma2_0 is not None else sigma2_0
        if config.needs_bandwidth and base is None:
            raise ValueError("objective.sigma2_0 is not set: measure it with odedit.objective.calibrate(...).")
        self._once = False
        self._sigma2_Q: dict[torch.device, Tensor] = {}
        if config.needs_bandwidth and base:
            self._sigma2_Q[torch.device("cpu")] = mmd.bandwidths(float(base), config.bandwidths)

    def without_warmup(self) -> Objective:
        """The same with the penalty at full weight from the first step."""
        other = copy.copy(self)
        other.config = replace(self.config, warmup=0.0, ramp=0.0)
        return other

    def for_one_gradient(self) -> Objective:
        """The same, frugal: of its terms a gradient is taken once at most, in the place of what it is made from.

        A second gradient of the same terms raises RuntimeError.
        """
        other = copy.copy(self)
        other._once = True
        return other

    def slots(self, editor: Editor, batch: EditBatch) -> tuple[str, ...]:
        """The sequences that this objective reads; the others need not run.

        Raises:
            InputError: It reads hard negatives, and the batch was made without.
        """
        if self.config.name == "odedit":
            return tuple(slot for slot in batch.slots if slot in SUPERVISION_SLOTS)
        wanted = {EDIT, *(editor.own_slots if self.config.effective_own_weight else ())}
        if self.config.name == "native_kl":
            wanted |= set(LOCALITY_SLOTS)
        if self.config.name == "contrast":
            negatives = self._compared_slots(batch)
            if not negatives:
                raise InputError(
                    "objective.name: 'contrast' reads hard negatives, and this batch was made without; give "
                    "encode_requests a NegativePool."
                )
            wanted |= {*negatives, *([REPHRASE] if self.config.generality_weight else [])}
        return tuple(slot for slot in batch.slots if slot in wanted)

    def slots_at_once(self, slots: Sequence[str]) -> tuple[str, ...]:
        """Those of `slots` that one step sees: of the negatives, which take turns and stand last, the first ones."""
        return self.slots_within(slots, 1)

    def slots_within(self, slots: Sequence[str], steps: int) -> tuple[str, ...]:
        """Those of `slots` that so many steps get to see between them."""
        negatives = [slot for slot in slots if is_negative(slot)]
        seen = steps * self.config.negatives_at_once if self.config.takes_turns else len(negatives)
        return tuple(slot for slot in slots if slot not in negatives[seen:])

    def columns_in_turn(self, slots: Sequence[str], present_EK: Tensor, steps_E: Tensor) -> Tensor | None:
        """Which of `slots` each edit sees in its step of this number, `(E, K at once)`; None: all.

        Args:
            present_EK: Which of `slots` each edit has; of its negatives, the first ones.
        """
        seen = self.slots_at_once(slots)
        if len(seen) == len(slots):
            return None
        first = len(slots) - sum(map(is_negative, slots))
        at_once = len(seen) - first
        count_E1 = present_EK[:, first:].sum(1, keepdim=True).clamp_min(1)
        fixed_EK = torch.arange(first, device=steps_E.device).expand(len(steps_E), -1)
        turn_EK = steps_E.long().unsqueeze(1) * at_once + torch.arange(at_once, device=steps_E.device)
        return torch.cat([fixed_EK, first + turn_EK % count_E1], dim=1)

    def in_turn(self, batch: EditBatch, turn: int) -> EditBatch:
        """The batch with what its edits see in the step of this number, for who makes each step's batch anew."""
        turn_E = torch.full((batch.num_edits,), turn, device=batch.tokens_EKS.device)
        columns_EK = self.columns_in_turn(batch.slots, batch.present_EK, turn_E)
        if columns_EK is None:
            return batch
        seen = batch.select(self.slots_at_once(batch.slots))
        # Who has fewer negatives than a step shows does not see one twice.
        return replace(
            batch.pick(seen.slots, columns_EK), present_EK=seen.present_EK, target_mask_EKT=seen.target_mask_EKT
        )

    @property
    def compares(self) -> bool:
        """Whether there is anything to compare with the unedited model."""
        return self.config.name != "native"

    def read(self, batch: EditBatch) -> Tensor | None:
        """The positions `(E, K, T)` whose final states this objective reads; None: all."""
        return None if self._reads_text else batch.predict_EKT

    @property
    def _reads_text(self) -> bool:
        return self.config.name == "odedit" and self.config.positions == "text"

    def __call__(
        self,
        backbone: Backbone,
        editor: Editor,
        params: EditParams,
        trace: Trace,
        batch: EditBatch,
        hidden: Tensor,
        unedited: Unedited | None,
    ) -> Terms:
        """The terms at the states of a forward under `editor.applied`.

        Args:
            hidden: Final hidden states of the edited model at the positions of `read`.
            unedited: What the same batch is without edit; None unless the objective `compares`.
        """
        config, weights = self.config, self.config.weights
        states_EKTD = gather_positions(hidden, batch.predict_EKT) if self._reads_text else hidden
        zero_E = torch.zeros(batch.num_edits, device=hidden.device)
        answer = batch.answers((EDIT,))
        tokens = self._tokens(backbone, editor, batch, states_EKTD, unedited)

        reliability = _of_one(tokens[EDIT], answer)
        locality = generality = Risk(zero_E, zero_E)
        scale_gradients: dict[str, Tensor] = {}
        if self.compares:
            assert unedited is not None, "what is compared with"
            compared = batch.answers(self._compared_slots(batch))
            locality = _locality(compared, tokens[_LOCALITY], unedited.weight_EK)
        _, nll_M, is_first_M = tokens[EDIT].kept.unbind(-1)
        worst_E = trained_E = answer.spread(nll_M, -torch.inf).flatten(1).amax(dim=-1)
        if REPHRASE in tokens:
            rephrase = batch.answers((REPHRASE,))
            generality = _of_one(tokens[REPHRASE], rephrase)
            of_rephrase = rephrase.spread(tokens[REPHRASE].kept[:, 1], -torch.inf)
            trained_E = torch.maximum(worst_E, of_rephrase.flatten(1).amax(dim=-1))
        if config.name == "odedit":
            generality = self._generality(batch, hidden, states_EKTD)
            regions = {"rel": reliability, "loc": locality, "gen": generality}
            if config.environments == "prompts":
                del regions["gen"]
            # A risk that is left out is no environment either.
            scale_gradients = {name: risk.scale_gradient for name, risk in regions.items() if weights[name]}
            if config.environments == "prompts":
                # One NLL per rephrase, beside the edit's own.
                for slot in REPHRASE_SLOTS:
                    scale_gradients[slot] = _of_one(tokens[slot], batch.answers((slot,))).scale_gradient
        own_E = editor.own_risk(params, trace, batch) if weights["own"] else zero_E
        values = {"rel": reliability.value, "loc": locality.value, "gen": generality.value, "own": own_E}
        total_E = torch.stack([weights[name] * value for name, value in values.items()]).sum(dim=0)
        return Terms(
            risks=values,
            total=total_E,
            scale_gradients=scale_gradients,
            penalty=tv_penalty(list(scale_gradients.values())) if scale_gradients else zero_E,
            worst_nll=worst_E,
            worst_trained_nll=trained_E,
            all_right=answer.spread(is_first_M, 1.0).flatten(1).bool().all(dim=-1),
        )

    def unedited(
        self, backbone: Backbone, batch: EditBatch, states_EKTD: Tensor, weight_EK: Tensor | None = None
    ) -> Unedited | None:
        """What the terms compare with, from the unedited model's final states at `batch.predict_EKT`.

        Args:
            weight_EK: What `weights_of_locality` found; None: found here.
        """
        if not self.compares:
            return None
        if weight_EK is None:
            weight_EK = self.weights_of_locality(backbone, batch, states_EKTD)
        read = self._read_by_head(batch)
        num_compared = len(read[_LOCALITY].at_M)
        if self.config.takes_turns or num_compared > _TOKENS_KEPT:
            return Unedited(batch.states_at(states_EKTD, read[_LOCALITY]), None, weight_EK)
        with torch.no_grad():
            # The same product as in a step: rounding depends on the number of rows, and Adam makes much of a gradient
            # that should be 0.
            states_MD = batch.states_at(states_EKTD, *read.values())
            log_q_MV = risks.log_probs(backbone.head(states_MD)[len(states_MD) - num_compared :])
            return Unedited(states_MD[len(states_MD) - num_compared :], log_q_MV, weight_EK)

    @torch.no_grad()
    def weights_of_locality(self, backbone: Backbone, batch: EditBatch, states_EKTD: Tensor) -> Tensor | None:
        """What a sequence weighs in R_loc, `(E, K)`, under `contrast`; None: all alike.

        A negative weighs 2 (1 - q(its target)).
        """
        if self.config.name != "contrast":
            return None
        answers = batch.answers(self._compared_slots(batch))
        states_MD = batch.states_at(states_EKTD, answers)
        size = max(1, _rows_at_once(backbone, states_MD.device) // 2)
        parts = [
            risks.log_probs(backbone.head(states_CD)).gather(-1, tokens_C.unsqueeze(-1)).squeeze(-1)
            for states_CD, tokens_C in zip(states_MD.split(size), answers.tokens_M.split(size), strict=True)
        ]
        same_EK = answers.spread(torch.cat(parts)).sum(dim=-1).exp()
        weight_EK = torch.zeros(batch.present_EK.shape, device=same_EK.device)
        return weight_EK.index_copy(1, answers.columns_K, _NEGATIVE_WEIGHT * (1.0 - same_EK))

    def _read_by_head(self, batch: EditBatch) -> dict[str, Answers]:
        """The tokens whose distribution is read, by slot; those of all locality prompts last."""
        slots = [EDIT]
        if self.config.name == "odedit" and self.config.environments == "prompts":
            slots += REPHRASE_SLOTS
        if self.config.name == "contrast" and REPHRASE in batch.slots:
            slots.append(REPHRASE)
        read = {slot: batch.answers((slot,)) for slot in slots}
        return read | ({_LOCALITY: batch.answers(self._compared_slots(batch))} if self.compares else {})

    def _compared_slots(self, batch: EditBatch) -> tuple[str, ...]:
        """Where R_loc is measured: not on what only the editor's own terms read."""
        return tuple(filter(is_negative if self.config.name == "contrast" else is_locality, batch.slots))

    def _tokens(
        self, backbone: Backbone, editor: Editor, batch: EditBatch, states_EKTD: Tensor, unedited: Unedited | None
    ) -> dict[str, Tokens]:
        """Risks of single tokens: NLL by slot, KL of all locality prompts. One product with the head for all."""
        read = self._read_by_head(batch)
        several: dict[str, Tokens] = {}
        smoothing = editor.label_smoothing if self.config.name in ("native", "native_kl") else 0.0
        kinds: dict[str, TokenRisk] = {
            name: NLL(answers.tokens_M, smoothing) for name, answers in read.items() if name != _LOCALITY
        }
        if unedited is not None and unedited.log_q_MV is not None:
            kinds[_LOCALITY] = KL(unedited.log_q_MV, self.config.locality_direction)
        elif unedited is not None:
            compared_MD = batch.states_at(states_EKTD, read.pop(_LOCALITY))
            several[_LOCALITY] = kl_of_states(
                compared_MD,
                unedited.states_MD,
                backbone.head,
                _rows_at_once(backbone, compared_MD.device),
                self.config.locality_direction,
                # Only a penalty is made of it.
                with_slope=self.config.name == "odedit",
            )
        logits_MV = backbone.head(batch.states_at(states_EKTD, *read.values()))
        return several | dict(zip(kinds, token_risks(logits_MV, list(kinds.values()), self._once), strict=True))

    def _generality(self, batch: EditBatch, hidden: Tensor, states_EKTD: Tensor) -> Risk:
        """R_gen: edit against rephrases, in the states that `positions` names."""
        if self.config.positions == "target":
            states, mask = states_EKTD, batch.target_mask_EKT
        else:
            states, mask = hidden, batch.prompt_EKS & ~batch.image_EKS
        edit = batch.slots.index(EDIT)
        others = batch.answers(tuple(slot for slot in REPHRASE_SLOTS if slot in batch.slots))
        x, x_mask = states[:, edit], mask[:, edit]
        y, y_mask = others.of(states), others.of(mask)
        unlike = None
        if self.config.kernel == "contrastive":
            negatives = batch.answers(self._compared_slots(batch))
            unlike = negatives.of(states), negatives.of(mask)
        if self.config.rephrases == "multiple":
            return self._distance(x, x_mask, y.flatten(1, 2), y_mask.flatten(1, 2), unlike)
        # The edit with each of its K rephrases.
        x, x_mask = x.unsqueeze(1).expand_as(y), x_mask.unsqueeze(1).expand_as(y_mask)
        unlike = None if unlike is None else (unlike[0].unsqueeze(1), unlike[1].unsqueeze(1))
        return _mean_over_slots(self._distance(x, x_mask, y, y_mask, unlike), others.present_EK)

    def _distance(
        self, x: Tensor, x_mask: Tensor, y: Tensor, y_mask: Tensor, unlike: tuple[Tensor, Tensor] | None
    ) -> Risk:
        """Of states x from states y; `contrastive` compares with unlike ones, `(..., K, T, D)` and their mask."""
        if unlike is not None:
            return mmd.contrastive(x, y, unlike[0], x_mask, y_mask, unlike[1])
        if self.config.kernel == "linear":
            return mmd.mmd2_linear(x, y, x_mask, y_mask)
        return mmd.mmd2_rbf(x, y, x_mask, y_mask, self._bandwidths(x.device))

    def _bandwidths(self, device: torch.device) -> Tensor:
        if device not in self._sigma2_Q:
            self._sigma2_Q[device] = self._sigma2_Q[torch.device("cpu")].to(device)
        return self._sigma2_Q[device]


def _rows_at_once(backbone: Backbone, device: torch.device) -> int:
    return max(1, _VALUES_AT_ONCE.get(device.type, _VALUES_AT_ONCE["cuda"]) // backbone.vocabulary_size)


def _means(tokens: Tokens, answers: Answers) -> Risk:
    """Of each sequence's tokens, `(E, K)`."""
    value, slope = (risks.masked_mean(answers.spread(v), answers.mask_EKT) for v in tokens[:2])
    return Risk(value, slope)


def _of_one(tokens: Tokens, answer: Answers) -> Risk:
    value_E1, slope_E1 = _means(tokens, answer)
    return Risk(value_E1.squeeze(1), slope_E1.squeeze(1))


def _locality(answers: Answers, tokens: Tokens, weight_EK: Tensor | None) -> Risk:
    """R_loc: KL at the answer positions, averaged over the locality prompts that the edit has; the sum where they have
    weights.
    """
    means = _means(tokens, answers)
    if weight_EK is None:
        return _mean_over_slots(means, answers.present_EK)
    weight_EK = answers.of(weight_EK) * answers.present_EK
    return Risk((weight_EK * means.value).sum(1), (weight_EK * means.scale_gradient).sum(1))


def _mean_over_slots(risk_EK: Risk, present_EK: Tensor) -> Risk:
    return Risk(risks.masked_mean(risk_EK.value, present_EK), risks.masked_mean(risk_EK.scale_gradient, present_EK))


@torch.no_grad()
def calibrate(
    backbone: Backbone, requests: Sequence[EditRequest], template: Template, positions: str = "target"
) -> float:
    """sigma_0^2: the mean squared distance between unedited states of edits and rephrases.

    Measured once on other records than the edited ones and kept: a bandwidth taken from the pair that is compared makes
    the loss constant when answers have one token.

    Args:
        requests: Enough for `CALIBRATION_STATES` states; further states are dropped.

    Raises:
        ValueError: Fewer than two states, or all states are the same.
    """
    supervision, _ = encode_requests(backbone, requests, template)
    batch = supervision.select((EDIT, *REPHRASE_SLOTS))
    prefix = backbone.prefix(batch, f"layers.{backbone.num_layers - 1}.ffn.in", positionwise=True)
    if positions == "target":
        states = backbone.suffix(prefix, batch.predict_EKT)[batch.target_mask_EKT]
    else:
        states = backbone.suffix(prefix)[batch.prompt_EKS & ~batch.image_EKS]
    distance = float(mmd.mean_squared_distance(states[:CALIBRATION_STATES].float()))
    if not distance > 0:
        raise ValueError("sigma_0^2 cannot be measured: all states of the calibration records are the same.")
    return distance
