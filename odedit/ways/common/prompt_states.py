"""States that a router reads: the input of a feed-forward half at the last prompt position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odedit.backbones import encode_supervision
from odedit.backbones.base import Backbone, ends_of
from odedit.backbones.common.generation import generate, until_end
from odedit.data.negatives import NegativePool
from odedit.data.pool import normal
from odedit.evaluation.scores import decoded
from odedit.inputs.batch import (
    EDIT,
    REPHRASE,
    REPHRASE_SLOTS,
    SUPERVISION_SLOTS,
    EditBatch,
    EditRequest,
    Probe,
    is_locality,
)
from odedit.inputs.prompts import Template
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache
from odedit.ways.common.router import NEAR_SLOTS, UNRELATED_SLOTS, Examples

KEY_SLOTS = (EDIT, *REPHRASE_SLOTS, REPHRASE)
"""Prompts of an edit that become its keys."""
FACT_PROBES = ("t_gen", "m_gen", "tm_gen", "far_gen")
"""Probes that ask for the edited fact with a picture of it."""
_RECORDS_AT_ONCE = 32
_CROSSED = 6
"""Pictures of other pool records about which a record's question is asked, to have more facts than records."""


class _Reached(Exception):
    """Ends a forward whose result is not needed."""


@torch.no_grad()
def prompt_states(backbone: Backbone, site: str, batch: EditBatch) -> Tensor:
    """Input of the site at the last prompt position of every sequence, `(E, K, D)`, float32 on the CPU."""
    size = max(1, budgets(batch.tokens_EKS.device).prefix_positions // batch.tokens_EKS[0].numel())
    rows = torch.arange(batch.num_edits, device=batch.tokens_EKS.device).split(size)
    return torch.cat([_states(backbone, site, batch.take(part)) for part in rows])


def _states(backbone: Backbone, site: str, batch: EditBatch) -> Tensor:
    prefix = backbone.prefix(batch, site)
    read: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(gather_positions(args[0], batch.predict_EKT[..., :1].flatten(0, 1)))
        raise _Reached

    handle = backbone.site(site).register_forward_pre_hook(stop)
    try:
        backbone.suffix(prefix)
    except _Reached:
        pass
    finally:
        handle.remove()
    return read[0].float().cpu().reshape(*prefix.shape, -1)


def states_of_edits(backbone: Backbone, site: str, requests: Sequence[EditRequest], template: Template) -> Tensor:
    """States of the prompts `KEY_SLOTS` of every request, `(N, 4, D)`; an absent one is the edit's own prompt."""
    states = [torch.zeros(0, len(KEY_SLOTS), backbone.hidden_size)]
    for part in _parts(requests):
        grid = [[_own(request, slot) or request.edit for slot in KEY_SLOTS] for request in part]
        states.append(prompt_states(backbone, site, _encoded(backbone, part, KEY_SLOTS, grid, template)))
    return torch.cat(states)


def read_pool(
    backbone: Backbone, site: str, pool: Sequence[EditRequest], template: Template, negatives: int
) -> Iterator[int | Examples]:
    """Reads pool records: yields the number of those read so far, and the examples at the end.

    Image features are on the model's device for 32 records at a time; on the CPU, for the pictures of all edits and
    their image rephrases.

    Args:
        negatives: Similar pictures of the pool per record about which its question is asked.
    """
    on_host = _features_on_host(backbone, pool)
    shown = {request.edit.picture.key: request for request in pool if request.edit.picture is not None}
    near = NegativePool({key: on_host[key] for key in shown}, negatives)
    probes = sorted({name for request in pool for name in request.probes if is_locality(name)})
    view_slots, other_slots = (*KEY_SLOTS, *FACT_PROBES), (*UNRELATED_SLOTS, *probes)
    near_slots = tuple(f"{NEAR_SLOTS}{number}" for number in range(1, negatives + 1))
    read_slots, scored_slots = (*KEY_SLOTS, *near_slots, *UNRELATED_SLOTS), (*FACT_PROBES, *probes)
    order = [(*read_slots, *scored_slots).index(slot) for slot in (*view_slots, *near_slots, *other_slots)]
    states, present, near_weight, answers = [], [], [], list[str]()
    crossed: list[Crossed] = []
    for part in _parts(pool):
        features = backbone.image_features([picture for request in part for picture in request.pictures()])
        supervision = encode_supervision(backbone, part, features, template, negatives=near)
        grid = [[request.probes.get(slot) for slot in scored_slots] for request in part]
        scored = backbone.encode(supervision.edit_ids, scored_slots, grid, features, template)
        read = supervision.select(read_slots), scored
        states.append(torch.cat([prompt_states(backbone, site, batch) for batch in read], dim=1)[:, order])
        present.append(torch.cat([batch.present_EK.cpu() for batch in read], dim=1)[:, order])
        near_weight.append(_weights(backbone, site, supervision.select(near_slots)))
        answers += _answers(backbone, site, supervision.select((EDIT,)))
        crossed.append(_crossed(backbone, site, part, near, shown, on_host, template))
        yield len(answers)
    count, states_NVD, is_present_NV = len(view_slots), torch.cat(states), torch.cat(present)
    weight_NM = is_present_NV[:, count:].float()
    weight_NM[:, : len(near_slots)] *= torch.cat(near_weight)
    numbers = _Numbers()
    targets = [[_unrelated(request, slot) for slot in other_slots] for request in pool]
    answer_NM = [[-1 if probe is None else numbers.of(probe.target) for probe in row] for row in targets]
    examples = Examples(
        views_NVD=states_NVD[:, :count],
        is_view_NV=is_present_NV[:, :count],
        view_slots=view_slots,
        negatives_NMD=states_NVD[:, count:],
        weight_NM=weight_NM,
        negative_slots=(*near_slots, *other_slots),
        fact_N=_facts(pool, answers),
        answer_N=torch.tensor([numbers.of(answer) for answer in answers]),
        answer_NM=torch.cat([torch.full((len(pool), len(near_slots)), -1), torch.tensor(answer_NM)], dim=1),
        is_crossed_N=torch.zeros(len(pool), dtype=torch.bool),
    )
    row_of = {request.edit_id: row for row, request in enumerate(pool)}
    yield examples.with_crossed(
        torch.cat([part.states_CVD for part in crossed]),
        torch.tensor([numbers.of(text) for part in crossed for text in part.answers], dtype=torch.long),
        torch.tensor([row_of[edit_id] for part in crossed for edit_id, _ in part.pairs], dtype=torch.long),
        torch.tensor([row_of[edit_id] for part in crossed for _, edit_id in part.pairs], dtype=torch.long),
    )


class Crossed(NamedTuple):
    """States of the prompts `KEY_SLOTS` of records' questions about other records' pictures.

    Attributes:
        states_CVD: The states.
        answers: The unedited model's answers.
        pairs: Ids of the two records: of the question, of the picture.
    """

    states_CVD: Tensor
    answers: list[str]
    pairs: list[tuple[str, str]]


def _crossed(
    backbone: Backbone,
    site: str,
    requests: Sequence[EditRequest],
    near: NegativePool,
    shown: Mapping[str, EditRequest],
    features: Mapping[str, Tensor],
    template: Template,
) -> Crossed:
    """Questions about some of the similar pictures: facts of the unedited model that no pool record has."""
    grid: list[list[Probe]] = []
    pairs: list[tuple[str, str]] = []
    for request in requests:
        if request.edit.picture is None:
            continue
        keys = [
            probe.picture.key for probe in near.probes(request, features[request.edit.picture.key]) if probe.picture
        ]
        known = [shown[key] for key in keys if key in shown]
        wording = request.supervision.get(REPHRASE_SLOTS[0], request.edit).prompt
        for other in known[:: max(1, len(known) // _CROSSED)][:_CROSSED]:
            first, second = other.edit, other.supervision.get(REPHRASE_SLOTS[1], other.edit)
            pairs.append((request.edit_id, other.edit_id))
            grid.append(
                [
                    replace(request.edit, prompt=prompt, picture=picture)
                    for picture in (first.picture, second.picture)
                    for prompt in (request.edit.prompt, wording)
                ]
            )
    if not grid:
        return Crossed(torch.zeros(0, len(KEY_SLOTS), backbone.hidden_size), [], [])
    used = {
        probe.picture.key: features[probe.picture.key].to(backbone.device)
        for row in grid
        for probe in row
        if probe.picture
    }
    ids = [f"crossed-{number}" for number in range(len(grid))]
    batch = backbone.encode(ids, KEY_SLOTS, grid, used, template)
    return Crossed(prompt_states(backbone, site, batch), _answers(backbone, site, batch.select((EDIT,))), pairs)


def _parts(requests: Sequence[EditRequest]) -> Iterator[Sequence[EditRequest]]:
    for start in range(0, len(requests), _RECORDS_AT_ONCE):
        yield requests[start : start + _RECORDS_AT_ONCE]


def _own(request: EditRequest, slot: str) -> Probe | None:
    """A prompt of `KEY_SLOTS`."""
    if slot == REPHRASE:
        return request.rephrase()
    return request.edit if slot == EDIT else request.supervision.get(slot)


def _unrelated(request: EditRequest, slot: str) -> Probe | None:
    return request.supervision.get(slot) if slot in SUPERVISION_SLOTS else request.probes.get(slot)


def _encoded(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    slots: Sequence[str],
    grid: Sequence[Sequence[Probe | None]],
    template: Template,
) -> EditBatch:
    pictures = [probe.picture for row in grid for probe in row if probe is not None and probe.picture is not None]
    features = backbone.image_features(pictures)
    return backbone.encode([request.edit_id for request in requests], slots, grid, features, template)


def _features_on_host(backbone: Backbone, pool: Sequence[EditRequest]) -> dict[str, Tensor]:
    """Image features of the pool's edits and their image rephrases, on the CPU."""
    features: dict[str, Tensor] = {}
    for part in _parts(pool):
        probes = [probe for request in part for probe in (request.edit, request.supervision.get(REPHRASE_SLOTS[1]))]
        pictures = [probe.picture for probe in probes if probe is not None and probe.picture is not None]
        features |= {key: feature.cpu() for key, feature in backbone.image_features(pictures).items()}
    return features


@torch.no_grad()
def _weights(backbone: Backbone, site: str, batch: EditBatch) -> Tensor:
    """1 - q(o) of the unedited model, `(E, K)`; 0 where o is its greedy answer."""
    size = max(1, budgets(batch.tokens_EKS.device).prefix_positions // batch.tokens_EKS[0].numel())
    weights = []
    for rows in torch.arange(batch.num_edits, device=batch.tokens_EKS.device).split(size):
        part = batch.take(rows)
        hidden_EKTD = backbone.suffix(backbone.prefix(part, site, positionwise=True), part.predict_EKT)
        log_q_EKTV = backbone.head(hidden_EKTD).log_softmax(dim=-1)
        log_q_EKT = log_q_EKTV.gather(-1, part.target_EKT.unsqueeze(-1)).squeeze(-1)
        q_EK = log_q_EKT.masked_fill(~part.target_mask_EKT, 0.0).sum(dim=-1).exp()
        differs_EK = ((log_q_EKTV.argmax(dim=-1) != part.target_EKT) & part.target_mask_EKT).any(dim=-1)
        weights.append(torch.where(differs_EK, 1 - q_EK, 0.0).cpu())
    return torch.cat(weights)


@torch.no_grad()
def _answers(backbone: Backbone, site: str, batch: EditBatch) -> list[str]:
    """The unedited model's greedy answers to one prompt per record."""
    kv_cache = KVCache()
    prefix = backbone.prefix(batch, site, kv_cache=kv_cache)
    read_EKT = batch.with_room(1, 0, backbone.max_positions).predict_EKT
    first_EKT = backbone.head(backbone.suffix(prefix, read_EKT, kv_cache)).argmax(dim=-1)
    tokens_EKN = generate(backbone, batch, prefix, kv_cache, first_EKT)
    return [decoded(backbone, until_end(tokens, ends_of(backbone))[0]) for tokens in tokens_EKN[:, 0].tolist()]


def _facts(pool: Sequence[EditRequest], answers: Sequence[str]) -> Tensor:
    """Number of each record's fact: its field `fact`; without one, its question with the unedited answer."""
    numbers = _Numbers()
    return torch.tensor(
        [
            numbers.of(request.meta.get("fact") or f"{request.edit.prompt} / {answer}")
            for request, answer in zip(pool, answers, strict=True)
        ]
    )


class _Numbers:
    """Numbers of texts, equal for texts that differ in case and spaces only."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, text: str) -> int:
        return self._known.setdefault(normal(text), len(self._known))
