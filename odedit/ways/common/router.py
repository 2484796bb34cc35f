"""Router: a projection in which the prompts of one fact are close, and thresholds above which an edit fires.

    z = normalize(W_2 gelu(W_1 (layernorm(h) - mean) + b_1) + b_2)

h is the state that the feed-forward half of a layer reads at the last prompt position. An edit's similarity to a prompt
is the largest cosine of z to one of its keys, the projections of its own prompt and its rephrases.

References:
    Representation Learning with Contrastive Predictive Coding (arXiv 1807.03748), for the loss (InfoNCE).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional

from odedit.runtime.brief import brief
from odedit.settings import Settings

ROUTER = "router."
KEYS, THRESHOLDS, THRESHOLD = f"{ROUTER}keys", f"{ROUTER}thresholds", f"{ROUTER}threshold"
"""Keys of every edit `(N, keys, width)`, its threshold `(N,)`, and the threshold of a new edit, `(1,)`."""
NOTHING = -1
"""Choice where no edit fires."""

_MEAN, _W1, _B1, _W2, _B2 = (f"{ROUTER}{name}" for name in ("mean", "in.weight", "in.bias", "out.weight", "out.bias"))
WEIGHTS = (_MEAN, _W1, _B1, _W2, _B2)
NEAR_SLOTS = "near_locality_"
"""Beginning of the names of negatives that ask a record's question about a similar picture."""
UNRELATED_SLOTS = ("text_locality", "image_locality")
"""Negatives of one record that are negatives of all others as well."""
_NEAR_AT_ONCE, _OTHERS_AT_ONCE = 6, 5
"""Negatives of each record that one step reads: of similar pictures, and of scored locality."""
_LARGEST_SCALE = 60.0
_SIMILARITIES_AT_ONCE = 2**24
_CANDIDATES = 401


@dataclass(frozen=True)
class RouterConfig(Settings):
    """Settings of the router's training.

    Attributes:
        hidden: Width of the hidden layer.
        width: Width of keys.
        steps: Steps of AdamW.
        batch_size: Pool records per step.
        learning_rate: Largest step size; warm-up over 30 steps, then half a cosine.
        weight_decay: Decoupled weight decay.
        false_firing_weight: Cost of a false firing relative to a missed edit, by which the threshold is chosen.
    """

    hidden: Annotated[int, Ge(1)] = 256
    width: Annotated[int, Ge(1)] = 64
    steps: Annotated[int, Ge(1)] = 400
    batch_size: Annotated[int, Ge(2)] = 96
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    false_firing_weight: Annotated[float, Ge(0)] = 0.2


@dataclass(frozen=True)
class Examples:
    """States of N pool records: V prompts about the record's fact, M prompts about something else.

    Attributes:
        views_NVD, negatives_NMD: States at the last prompt position, float32.
        is_view_NV: Presence of the prompts about the fact.
        weight_NM: Weight of the negatives, 0 where absent: 1 - q(o) for similar pictures, else 1.
        view_slots, negative_slots: Names of the prompts.
        fact_N: Number of the record's fact; the same for records about the same thing.
        answer_N: Number of the answer that the unedited model gives to the record's question.
        answer_NM: Numbers of its answers to the negatives; -1: unknown.
        is_crossed_N: True for a record's question about another record's picture, an example without probes.
    """

    views_NVD: Tensor
    is_view_NV: Tensor
    view_slots: tuple[str, ...]
    negatives_NMD: Tensor
    weight_NM: Tensor
    negative_slots: tuple[str, ...]
    fact_N: Tensor
    answer_N: Tensor
    answer_NM: Tensor
    is_crossed_N: Tensor

    __repr__ = brief

    def to(self, device: torch.device) -> Examples:
        """The examples on a device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def with_crossed(self, states_CVD: Tensor, answer_C: Tensor, asked_C: Tensor, shown_C: Tensor) -> Examples:
        """The examples with others that have the first V views, and a fact each.

        Their negatives ask the same about other pictures, and something else about the same picture, with another
        answer.

        Args:
            asked_C, shown_C: Numbers of the records whose question and whose picture they have; ascending `asked_C`.
        """
        count, num_views = states_CVD.shape[:2]
        absent = self.views_NVD.shape[1] - num_views
        is_view_CV = torch.ones(count, num_views, dtype=torch.bool)
        answer_N = torch.cat([self.answer_N, answer_C])
        views_NVD = torch.cat([self.views_NVD, functional.pad(states_CVD, (0, 0, 0, absent))])
        weight_CM = torch.zeros(count, self.weight_NM.shape[1])
        negatives_CMD = states_CVD.new_zeros(count, *self.negatives_NMD.shape[1:])
        most = sum(slot.startswith(NEAR_SLOTS) for slot in self.negative_slots)
        for row, (asked, shown) in enumerate(zip(asked_C.tolist(), shown_C.tolist(), strict=True)):
            siblings = (len(self.answer_N) + (asked_C == asked).nonzero().squeeze(1)).tolist()
            others = torch.tensor([asked, shown, *siblings][:most])
            weight_CM[row, : len(others)] = (answer_N[others] != answer_C[row]).float()
            negatives_CMD[row, : len(others)] = views_NVD[others, 0]
        return replace(
            self,
            views_NVD=views_NVD,
            is_view_NV=torch.cat([self.is_view_NV, functional.pad(is_view_CV, (0, absent))]),
            negatives_NMD=torch.cat([self.negatives_NMD, negatives_CMD]),
            weight_NM=torch.cat([self.weight_NM, weight_CM]),
            fact_N=torch.cat([self.fact_N, int(self.fact_N.max()) + 1 + torch.arange(count)]),
            answer_N=answer_N,
            answer_NM=torch.cat([self.answer_NM, torch.full((count, self.answer_NM.shape[1]), -1)]),
            is_crossed_N=torch.cat([self.is_crossed_N, torch.ones(count, dtype=torch.bool)]),
        )

    def records(self) -> Tensor:
        """Numbers of the pool records."""
        return (~self.is_crossed_N).nonzero().squeeze(1)

    def without_facts_of(self, records: Tensor) -> Tensor:
        """Numbers of the examples about other facts than these pool records'."""
        is_same_N = torch.isin(self.fact_N, self.fact_N[records])
        is_same_N |= self.is_crossed_N & torch.isin(self.answer_N, self.answer_N[records])
        return (~is_same_N).nonzero().squeeze(1)

    def views(self, slots: tuple[str, ...], records: Tensor) -> Tensor:
        """States of some prompts about the fact, `(records, slots, D)`."""
        return self.views_NVD[records][:, [self.view_slots.index(slot) for slot in slots]]


def project(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Unit vectors `(..., width)` of states `(..., D)`, float32."""
    normed = functional.layer_norm(states.float(), states.shape[-1:]) - weights[_MEAN]
    hidden = functional.gelu(functional.linear(normed, weights[_W1], weights[_B1]))
    return functional.normalize(functional.linear(hidden, weights[_W2], weights[_B2]), dim=-1)


def similarity(keys_NKW: Tensor, z_RW: Tensor) -> Tensor:
    """Largest cosine to a key of every edit, `(R, N)`."""
    return (z_RW @ keys_NKW.flatten(0, 1).T).unflatten(1, keys_NKW.shape[:2]).amax(dim=-1)


def choose(params: Mapping[str, Tensor], states_RD: Tensor) -> Tensor:
    """Number of the edit whose similarity exceeds its threshold most, per row, or `NOTHING`."""
    keys_NKW, thresholds_N = params[KEYS].float(), params[THRESHOLDS].float()
    if not len(thresholds_N):
        return torch.full((len(states_RD),), NOTHING, device=states_RD.device)
    chosen = []
    for part_RD in states_RD.split(max(1, _SIMILARITIES_AT_ONCE // keys_NKW[..., 0].numel())):
        excess_R, edit_R = (similarity(keys_NKW, project(params, part_RD)) - thresholds_N).max(dim=1)
        chosen.append(edit_R.masked_fill(excess_R <= 0, NOTHING))
    return torch.cat(chosen)


def train(examples: Examples, records: Tensor, config: RouterConfig, seed: int) -> Iterator[float | dict[str, Tensor]]:
    """Trains the projection on some records: yields the loss of every step, and the weights at the end."""
    generator = torch.Generator().manual_seed(seed)
    weights = _initial(examples, records, config, generator)
    scale = torch.tensor(2.3, device=examples.views_NVD.device, requires_grad=True)
    trained = [weights[name].requires_grad_() for name in WEIGHTS if name != _MEAN]
    optimizer = torch.optim.AdamW([*trained, scale], config.learning_rate, weight_decay=config.weight_decay)
    for step in range(config.steps):
        warm, cosine = min(1.0, (step + 1) / 30), 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warm * cosine
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = _loss(examples, records, weights, scale, config.batch_size, generator)
            loss.backward()
        optimizer.step()
        yield float(loss.detach())
    yield {name: value.detach() for name, value in weights.items()}


def _initial(
    examples: Examples, records: Tensor, config: RouterConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights before training, uniform as in `torch.nn.Linear`; drawn on the CPU, the same for every device."""
    device, size = examples.views_NVD.device, examples.views_NVD.shape[-1]
    known = examples.views_NVD[records][examples.is_view_NV[records]]
    weights = {_MEAN: functional.layer_norm(known, (size,)).mean(dim=0)}
    shapes = {_W1: (config.hidden, size), _B1: (config.hidden,), _W2: (config.width, config.hidden)}
    shapes[_B2] = (config.width,)
    for name, shape in shapes.items():
        bound = 1 / math.sqrt(size if name in (_W1, _B1) else config.hidden)
        weights[name] = ((2 * torch.rand(shape, generator=generator) - 1) * bound).to(device)
    return weights


def _loss(
    examples: Examples,
    records: Tensor,
    weights: Mapping[str, Tensor],
    scale: Tensor,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """InfoNCE: two prompts about one fact against the other facts of the batch and the records' negatives."""
    device = examples.views_NVD.device
    is_crossed_N = examples.is_crossed_N[records]
    crossed = records[is_crossed_N]
    count = min(len(crossed), batch_size // 2)
    anchor_B = torch.cat(
        [_some(records[~is_crossed_N], batch_size - count, generator), _some(crossed, count, generator)]
    )
    is_same_BN = examples.fact_N[anchor_B].unsqueeze(1) == examples.fact_N[records]
    partner_B = records[_drawn(is_same_BN, generator)]
    first_B = _drawn(examples.is_view_NV[anchor_B], generator)
    second_B = _drawn(examples.is_view_NV[partner_B], generator)
    columns = _columns(examples.negative_slots, generator)
    negatives_BCD, weight_BC = examples.negatives_NMD[anchor_B][:, columns], examples.weight_NM[anchor_B][:, columns]

    factor = scale.exp().clamp(max=_LARGEST_SCALE)
    z_BW = project(weights, examples.views_NVD[anchor_B, first_B])
    negative_BCW = project(weights, negatives_BCD)
    to_views_BB = z_BW @ project(weights, examples.views_NVD[partner_B, second_B]).T * factor
    own = torch.eye(len(anchor_B), dtype=torch.bool, device=device)
    # A crossed example's fact is known by its answer only.
    any_crossed_BB = examples.is_crossed_N[anchor_B].unsqueeze(1) | examples.is_crossed_N[anchor_B]
    is_same_BB = _equal(examples.fact_N[anchor_B]) | (any_crossed_BB & _equal(examples.answer_N[anchor_B]))
    to_negatives_BC = torch.einsum("bw,bcw->bc", z_BW, negative_BCW) * factor + weight_BC.log()
    logits = [to_views_BB.masked_fill(is_same_BB & ~own, -torch.inf), to_negatives_BC]
    unrelated = [place for place, column in enumerate(columns) if examples.negative_slots[column] in UNRELATED_SLOTS]
    if unrelated:
        shared_MW, present_M = negative_BCW[:, unrelated].flatten(0, 1), weight_BC[:, unrelated].flatten()
        logits.append((z_BW @ shared_MW.T * factor).masked_fill(present_M == 0, -torch.inf))
    return functional.cross_entropy(torch.cat(logits, dim=1), torch.arange(len(anchor_B), device=device))


def _some(records: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return records[torch.randperm(len(records), generator=generator)[:count].to(records.device)]


def _equal(numbers_B: Tensor) -> Tensor:
    return numbers_B.unsqueeze(1) == numbers_B


def _drawn(allowed_BN: Tensor, generator: torch.Generator) -> Tensor:
    """One allowed column per row, uniformly."""
    drawn = torch.rand(allowed_BN.shape, generator=generator).to(allowed_BN.device)
    return drawn.masked_fill(~allowed_BN, -1).argmax(dim=1)


def _columns(slots: tuple[str, ...], generator: torch.Generator) -> list[int]:
    """Negatives of a step: some of similar pictures, all unrelated ones, some of the others."""
    near = [index for index, slot in enumerate(slots) if slot.startswith(NEAR_SLOTS)]
    others = [index for index, slot in enumerate(slots) if index not in near and slot not in UNRELATED_SLOTS]
    fixed = [index for index, slot in enumerate(slots) if slot in UNRELATED_SLOTS]

    def some(columns: list[int], count: int) -> list[int]:
        return [columns[index] for index in torch.randperm(len(columns), generator=generator)[:count].tolist()]

    return [*some(near, _NEAR_AT_ONCE), *fixed, *some(others, _OTHERS_AT_ONCE)]


@dataclass(frozen=True)
class Similarities:
    """Similarities of left-out pool records, as if they had been edited.

    Attributes:
        hits: Similarity of prompts about a record's fact to the record.
        near, far: Similarity of prompts about something else (similar pictures, others) to the closest record.
    """

    hits: Tensor
    near: Tensor
    far: Tensor

    __repr__ = brief


@torch.no_grad()
def left_out(
    examples: Examples, records: Tensor, weights: Mapping[str, Tensor], key_slots: tuple[str, ...]
) -> Similarities:
    """Similarities of records that the projection was not trained on; one record per fact stands for an edit."""
    facts = examples.fact_N[records]
    first = torch.stack([(facts == fact).nonzero()[0, 0] for fact in facts.unique()])
    edits_E = records[first]
    keys_EKW = project(weights, examples.views(key_slots, edits_E))
    asked = [index for index, slot in enumerate(examples.view_slots) if slot not in key_slots]
    hits = [torch.zeros(0, device=facts.device)]
    for index in asked:
        sims_EE = similarity(keys_EKW, project(weights, examples.views_NVD[edits_E, index]))
        hits.append(sims_EE.diagonal()[examples.is_view_NV[edits_E, index]])
    near, far = [hits[0]], [hits[0]]
    for index, slot in enumerate(examples.negative_slots):
        sims_EE = similarity(keys_EKW, project(weights, examples.negatives_NMD[edits_E, index]))
        present_E = examples.weight_NM[edits_E, index] > 0.5
        if slot.startswith(NEAR_SLOTS):
            near.append(sims_EE.diagonal()[present_E])  # whether it shows another edit's fact is unknown
            continue
        # A prompt whose answer is the one that an edit replaces may ask about that edit's fact.
        is_same_EE = examples.answer_NM[edits_E, index].unsqueeze(1) == examples.answer_N[edits_E]
        closest_E = sims_EE.masked_fill(is_same_EE, -1.0).amax(dim=1)
        (near if slot.endswith("_near") else far).append(closest_E[present_E])
    return Similarities(torch.cat(hits), torch.cat(near), torch.cat(far))


def threshold(parts: list[Similarities], false_firing_weight: float) -> tuple[float, dict[str, float]]:
    """Threshold with the largest share of hits minus weighted shares of false firings; the shares at it, by name."""
    at_T = torch.linspace(-1, 1, _CANDIDATES)
    hits_T, near_T, far_T = (
        _share_above(torch.cat([getattr(part, name) for part in parts]).cpu(), at_T) for name in ("hits", "near", "far")
    )
    best = int((hits_T - false_firing_weight * (near_T + far_T)).argmax())
    shares = {"hits": float(hits_T[best]), "near_firings": float(near_T[best]), "far_firings": float(far_T[best])}
    return float(at_T[best]), shares


def _share_above(values: Tensor, at_T: Tensor) -> Tensor:
    return (values.unsqueeze(1) > at_T).float().mean(dim=0) if len(values) else torch.zeros_like(at_T)
