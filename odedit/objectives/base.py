"""The contract of an objective: it computes the terms that an edit minimises, one value per edit.

An objective is one file that defines `OBJECTIVE`, a subclass of `Objective` with its frozen `Config` beside it. It
takes no step: `odedit.editing.primal_dual` updates phi_e and the multiplier.

Every objective has four terms: `rel`, the negative log-likelihood of the edit's answer; `loc`, the divergence from the
unedited model; `gen`, generality; `own`, the editor's own terms. A term that it does not use is 0. The total is the
weighted sum. `Objective` computes `rel`, `loc` and `own`; a subclass selects its sequences and overrides `generality`,
`scale_gradients` or `further_terms`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import Editor, Trace
from odedit.errors import InputError
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, Answers, EditBatch, EditParams, is_locality, unnumbered
from odedit.objectives.common.penalty import Invariance, tv_penalty
from odedit.objectives.common.terms import (
    COMPARED,
    Forward,
    Terms,
    Unedited,
    mean_over_slots,
    token_means,
    weighted_sum,
)
from odedit.risks import risks
from odedit.risks.risks import Risk
from odedit.risks.tokens import KL, NLL, TokenRisk, Tokens, kl_of_states, token_risks
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import gather_positions
from odedit.settings import Settings

Positions = Literal["target", "text"]
_TOKENS_KEPT = 1024
"""Largest number of tokens whose unedited distributions over the vocabulary stay in memory between steps."""


def require(name: str, got: object, ok: bool, allowed: str) -> None:
    """Raises ValueError with the setting, its value and the allowed values unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: got {got!r}, expected {allowed}.")


@dataclass(frozen=True)
class BaseConfig(Settings):
    """Settings of every objective, and properties of the objective that are read before it is built.

    Attributes:
        reliability_weight: Weight of R_rel, the negative log-likelihood of the edit's answer.
        own_weight: Weight of the editor's own terms; null: 1, or 0 under an objective that replaces the editor's loss.
    """

    reliability_weight: Annotated[float, Ge(0)] = 1.0
    own_weight: float | None = None

    replaces_native_loss: ClassVar[bool] = True
    """True when the objective replaces the editor's own loss: its terms, its label smoothing, and the loss by which
    `odedit train` trains the editor's weights.
    """
    compares: ClassVar[bool] = False
    """True when a term compares with the unedited model."""
    terms_added_to_training: ClassVar[tuple[str, ...]] = ()
    """Terms that `odedit train` adds to the editor's own training loss, unless the objective replaces it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        learned = [value for name, value in self.weights.items() if name != "own" or not self.replaces_native_loss]
        require("reliability_weight", self.reliability_weight, any(learned), "not all risks without weight")

    @property
    def name(self) -> str:
        """File name in `odedit/objectives`, or the dotted module outside of it."""
        return type(self).__module__.removeprefix(f"{__package__}.")

    @property
    def effective_own_weight(self) -> float:
        """Weight of the editor's own terms."""
        if self.own_weight is not None:
            return self.own_weight
        return 0.0 if self.replaces_native_loss else 1.0

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every term, by its name in `Terms.risks`."""
        return {"rel": self.reliability_weight, "loc": 0.0, "gen": 0.0, "own": self.effective_own_weight}

    @property
    def supervision_slots(self) -> tuple[str, ...]:
        """Slots of `EditRequest.supervision` that the objective reads, those of the first rephrases for all of them."""
        return ()

    @property
    def joins_rephrases(self) -> bool:
        """True when a text and an image rephrase are read as one sequence, see `EditRequest.rephrase`."""
        return False

    @property
    def num_negatives(self) -> int:
        """Number of hard negatives per edit (see `odedit.data.negatives`)."""
        return 0

    @property
    def num_positives(self) -> int:
        """Number of the pool's pictures of the same thing that are trained to the new answer, as joined rephrases."""
        return 0

    @property
    def takes_turns(self) -> bool:
        """True when a step reads only some of the hard negatives, in turn."""
        return False

    @property
    def calibrated_positions(self) -> Positions | None:
        """Positions of the unedited states whose spread `calibrate` must measure first; None: no measurement."""
        return None

    @property
    def needs_bandwidth(self) -> bool:
        """True when the objective needs the measured bandwidth sigma_0^2."""
        return self.calibrated_positions is not None

    @property
    def invariance(self) -> Invariance:
        """Settings of the invariance penalty; by default it has weight 0."""
        return Invariance()

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that cannot change an edit with the present values of others, each with the reason."""
        return {}

    def base_slots(self, editor: Editor) -> frozenset[str]:
        """Slots of the edit and of the editor's own terms."""
        return frozenset({EDIT, *(editor.own_slots if self.effective_own_weight else ())})

    def reads(self, editor: Editor) -> frozenset[str]:
        """Slots of the edit and of the supervision that it is trained with.

        A run without `LOCALITY_SLOTS` and negatives needs no unrelated records.
        """
        return self.base_slots(editor).union(self.supervision_slots)

    def check(self, editor: Editor) -> None:
        """Raises InputError if the objective cannot train the editor's edits."""
        learns = self.invariance.fixed is None
        if learns and self.invariance.multiplier.input == "flat" and editor.length_varies:
            raise InputError(
                "objective.multiplier.input: got 'flat', but with these settings of the editor the size of an edit "
                "depends on its batch; use 'sketch'."
            )


@dataclass(frozen=True)
class ComparingConfig(BaseConfig):
    """Settings of an objective with the term R_loc.

    Attributes:
        locality_weight: Weight of R_loc, the divergence from the unedited model; 0 leaves it out.
        locality_direction: `edited_first`, KL(edited || unedited) as in eq. 3 of the paper, or `base_first`,
            KL(unedited || edited).
    """

    locality_weight: Annotated[float, Ge(0)] = 1.0
    locality_direction: risks.Direction = "edited_first"

    compares: ClassVar[bool] = True

    @property
    def weights(self) -> dict[str, float]:
        return super().weights | {"loc": self.locality_weight}

    @property
    def supervision_slots(self) -> tuple[str, ...]:
        return LOCALITY_SLOTS


class Objective:
    """Computes `Terms` from a forward; holds settings and no state.

    This base class uses the edit's likelihood and the editor's own terms.
    """

    Config: ClassVar[type] = BaseConfig
    has_environments: ClassVar[bool] = False
    """True when the terms have scale gradients, which the penalty is computed from."""

    def __init__(self, config: Any, sigma2_0: float | None = None) -> None:
        """
        Args:
            config: Instance of `Config`.
            sigma2_0: Measured bandwidth; read if `config.needs_bandwidth`.

        Raises:
            ValueError: The objective needs a bandwidth and `sigma2_0` is None.
        """
        self.config = config
        self._once = False

    def without_warmup(self) -> Objective:
        """A copy whose penalty has its full weight from the first step."""
        return self

    def for_one_gradient(self) -> Objective:
        """A copy whose backward overwrites the logits: its terms can be differentiated only once.

        A second gradient of the same terms raises RuntimeError.
        """
        other = copy.copy(self)
        other._once = True
        return other

    # --- sequences ---------------------------------------------------------------------------------------------------

    def slots(self, editor: Editor, batch: EditBatch) -> tuple[str, ...]:
        """Slots of the batch that the objective reads; the others need not run.

        Raises:
            InputError: The batch lacks a slot that the objective requires.
        """
        wanted = self.config.reads(editor)
        return tuple(slot for slot in batch.slots if unnumbered(slot) in wanted)

    def slots_at_once(self, slots: Sequence[str]) -> tuple[str, ...]:
        """Slots that a single step reads."""
        return self.slots_within(slots, 1)

    def slots_within(self, slots: Sequence[str], steps: int) -> tuple[str, ...]:
        """Slots that the first `steps` steps read."""
        return tuple(slots)

    def columns_in_turn(self, slots: Sequence[str], present_EK: Tensor, steps_E: Tensor) -> Tensor | None:
        """Indices into `slots` that each edit reads in its next step, `(E, slots of a step)`; None: all slots.

        Args:
            present_EK: Presence of each slot; False also for negatives of weight 0.
            steps_E: Number of each edit's step, from 0.
        """
        return None

    def in_turn(self, batch: EditBatch, turn: int) -> EditBatch:
        """Part of the batch that step number `turn` reads, the same number for all edits."""
        return batch

    def compared_slots(self, batch: EditBatch) -> tuple[str, ...]:
        """Slots on which R_loc is measured."""
        return tuple(filter(is_locality, batch.slots))

    def likelihood_slots(self, batch: EditBatch) -> tuple[str, ...]:
        """Slots whose answers' NLL is computed, the edit first."""
        return (EDIT,)

    def trained_slots(self, batch: EditBatch) -> tuple[str, ...]:
        """Slots whose answers' likelihood is trained, the edit first; an edit stops when all are learned."""
        return (EDIT,)

    @property
    def compares(self) -> bool:
        """True when a term compares with the unedited model."""
        return bool(self.config.compares)

    @property
    def reads_text(self) -> bool:
        """True when a term reads states at all positions, not only at those that predict answers."""
        return False

    @property
    def reads_displacements(self) -> bool:
        """True when a term reads by how much an edit moves the states at all answers of the batch."""
        return False

    def read(self, batch: EditBatch) -> Tensor | None:
        """Positions whose final states the objective reads, `(E, K, T)`; None: all."""
        return None if self.reads_text else batch.predict_EKT

    # --- terms -------------------------------------------------------------------------------------------------------

    def generality(self, forward: Forward) -> Risk:
        """Term `gen`."""
        return forward.no_risk()

    def scale_gradients(self, forward: Forward, risks: Mapping[str, Risk]) -> dict[str, Tensor]:
        """Scale gradients of the penalty's environments by name, `(E,)` each.

        Args:
            risks: Terms `rel`, `loc` and `gen`.
        """
        return {}

    def further_terms(self, forward: Forward) -> dict[str, Tensor]:
        """Terms beside `TERMS` by name, `(E,)` each; their weights are in `config.weights`.

        A term of weight 0 is reported and changes nothing else.
        """
        return {}

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
        """Terms at one forward under `editor.applied`.

        Args:
            hidden: Final hidden states of the edited model at the positions of `read`.
            unedited: Result of `unedited` for the same batch; None unless the objective `compares`.
        """
        assert (unedited is not None) == self.compares
        weights = self.config.weights
        states_EKTD = gather_positions(hidden, batch.predict_EKT) if self.reads_text else hidden
        tokens = self._tokens(backbone, editor, batch, states_EKTD, unedited)
        forward = Forward(editor, params, trace, batch, hidden, states_EKTD, tokens, unedited)
        regions = {
            "rel": forward.likelihood(EDIT),
            "loc": forward.no_risk() if unedited is None else self._locality(forward, unedited.weight_EK),
            "gen": self.generality(forward),
        }
        scale_gradients = self.scale_gradients(forward, regions)
        no_risk_E = forward.no_risk().value
        own_E = editor.own_risk(params, trace, batch) if weights["own"] else no_risk_E
        values = {name: risk.value for name, risk in regions.items()} | {"own": own_E} | self.further_terms(forward)
        worst_E = trained_E = forward.worst_nll(EDIT)
        for slot in self.trained_slots(batch)[1:]:
            trained_E = torch.maximum(trained_E, forward.worst_nll(slot))
        is_first_M = tokens[EDIT].kept[:, 2]
        return Terms(
            risks=values,
            total=weighted_sum(weights, values),
            scale_gradients=scale_gradients,
            penalty=tv_penalty(list(scale_gradients.values())) if scale_gradients else no_risk_E,
            worst_nll=worst_E,
            worst_trained_nll=trained_E,
            all_right=batch.answers((EDIT,)).spread(is_first_M, 1.0).flatten(1).bool().all(dim=-1),
        )

    def unedited(
        self, backbone: Backbone, batch: EditBatch, states_EKTD: Tensor, weight_EK: Tensor | None = None
    ) -> Unedited | None:
        """Unedited model's answers, which the terms compare with; None unless the objective `compares`.

        Args:
            states_EKTD: Final states of the unedited model at `batch.predict_EKT`.
            weight_EK: Result of `weights_of_locality`; None: computed here.
        """
        if not self.compares:
            return None
        if weight_EK is None:
            weight_EK = self.weights_of_locality(backbone, batch, states_EKTD)
        kept_EKTD = states_EKTD if self.reads_displacements else None
        read = self._read_by_head(batch)
        num_compared = len(read[COMPARED].at_M)
        if self.config.takes_turns or num_compared > _TOKENS_KEPT:
            return Unedited(batch.states_at(states_EKTD, read[COMPARED]), None, weight_EK, kept_EKTD)
        with torch.no_grad():
            # Use the matmul shape of a step. Rounding depends on the number of rows, and Adam amplifies a gradient that
            # should be exactly 0.
            states_MD = batch.states_at(states_EKTD, *read.values())
            log_q_MV = risks.log_probs(backbone.head(states_MD)[len(states_MD) - num_compared :])
            return Unedited(states_MD[len(states_MD) - num_compared :], log_q_MV, weight_EK, kept_EKTD)

    def weights_of_locality(self, backbone: Backbone, batch: EditBatch, states_EKTD: Tensor) -> Tensor | None:
        """Weight of each sequence in R_loc, `(E, K)`; None: R_loc is the mean over the compared sequences."""
        return None

    def _read_by_head(self, batch: EditBatch) -> dict[str, Answers]:
        """Answers whose distributions the head computes, by slot; those of the compared sequences are last."""
        read = {slot: batch.answers((slot,)) for slot in self.likelihood_slots(batch)}
        return read | ({COMPARED: batch.answers(self.compared_slots(batch))} if self.compares else {})

    def _tokens(
        self, backbone: Backbone, editor: Editor, batch: EditBatch, states_EKTD: Tensor, unedited: Unedited | None
    ) -> dict[str, Tokens]:
        """Risks of single tokens, from one product with the head: NLL by slot, and KL of the compared sequences."""
        read = self._read_by_head(batch)
        in_parts: dict[str, Tokens] = {}
        smoothing = 0.0 if self.config.replaces_native_loss else editor.label_smoothing
        kinds: dict[str, TokenRisk] = {
            name: NLL(answers.tokens_M, smoothing) for name, answers in read.items() if name != COMPARED
        }
        if unedited is not None and unedited.log_q_MV is not None:
            kinds[COMPARED] = KL(unedited.log_q_MV, self.config.locality_direction)
        elif unedited is not None:
            compared_MD = batch.states_at(states_EKTD, read.pop(COMPARED))
            in_parts[COMPARED] = kl_of_states(
                compared_MD,
                unedited.states_MD,
                backbone.head,
                rows_at_once(backbone, compared_MD.device),
                self.config.locality_direction,
                with_slope=self.has_environments,
            )
        logits_MV = backbone.head(batch.states_at(states_EKTD, *read.values()))
        return in_parts | dict(zip(kinds, token_risks(logits_MV, list(kinds.values()), self._once), strict=True))

    def _locality(self, forward: Forward, weight_EK: Tensor | None) -> Risk:
        """R_loc: KL at the answers' positions, averaged over the compared sequences, or summed with their weights."""
        answers = forward.batch.answers(self.compared_slots(forward.batch))
        means = token_means(forward.tokens[COMPARED], answers)
        if weight_EK is None:
            return mean_over_slots(means, answers.present_EK)
        weight_EK = answers.of(weight_EK) * answers.present_EK
        return Risk((weight_EK * means.value).sum(1), (weight_EK * means.scale_gradient).sum(1))


def rows_at_once(backbone: Backbone, device: torch.device) -> int:
    """Rows of logits per product with the head where they are not stored."""
    return max(1, budgets(device).objective_logits // backbone.vocabulary_size)
