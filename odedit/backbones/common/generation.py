"""Greedy generation by fixed-point iteration, and where an answer ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, ends_of
from odedit.inputs.batch import EditBatch
from odedit.runtime.kv_cache import KeyValues

LONGEST_REST = 8
"""Tokens beyond its target's length after which a generated answer that has not ended is cut off."""


NO_TOKEN = -1
"""Stands for a token that was not generated, since the model takes no more positions or the answer is cut off there."""


def generate(
    backbone: Backbone,
    batch: EditBatch,
    prefix: Prefix,
    memory: KeyValues,
    first_choice_EKT: Tensor,
    longest_rest: int = LONGEST_REST,
) -> Tensor:
    """Greedily generated answers for every probe, `(E, K, T + longest_rest)`, with `NO_TOKEN` behind the last token.

    `until_end` says where each ends.

    Args:
        memory: Keys and values of a forward, as `greedy` takes them.
        first_choice_EKT: The model's choices given the target, and the one behind it, `(E, K, T + 1)`.
        longest_rest: Tokens beyond its target's length after which an answer that has not ended is cut off.
    """
    ends = ends_of(backbone)
    end = min(ends)
    roomy = batch.with_room(longest_rest, end, backbone.max_positions)
    count_EK1 = batch.target_mask_EKT.sum(dim=-1, keepdim=True)
    places_N = torch.arange(roomy.target_EKT.shape[-1], device=count_EK1.device)
    choice_EKN = torch.nn.functional.pad(first_choice_EKT, (0, longest_rest - 1)).where(places_N <= count_EK1, end)
    tokens_EKN = greedy(backbone, roomy, backbone.with_room(prefix, roomy), memory, choice_EKN, ends)
    return tokens_EKN.where(roomy.target_mask_EKT, NO_TOKEN)


def until_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """A generated answer without its end and what follows, and whether it has ended."""
    found = next((place for place, token in enumerate(tokens) if token in ends or token == NO_TOKEN), None)
    return list(tokens[:found]), found is not None and tokens[found] != NO_TOKEN


@torch.no_grad()
def greedy(
    backbone: Backbone,
    batch: EditBatch,
    prefix: Prefix,
    memory: KeyValues,
    first_choice_EKT: Tensor,
    ends: Collection[int] = (),
) -> Tensor:
    """Greedily generated tokens for every probe, as many as its target has, `(E, K, T)`.

    By fixed-point iteration: feed a draft, replace it by the model's first choices, repeat. A token is final as soon
    as all before it are, so T rounds give exactly the tokens of one-by-one decoding, and mostly two or three do. A
    round computes the target's positions alone, which attend to the prompt's keys and values.

    Args:
        memory: Keys and values of a forward of `prefix` and suffix, under the edit if there is one. Call this
            inside the same `applied` block.
        first_choice_EKT: The model's choices given the target, which is the first draft.
        ends: Tokens that end an answer: what stands behind the first of them is not generated and has no meaning.
    """
    mask_EKT, num_targets = batch.target_mask_EKT, batch.target_EKT.shape[-1]
    end_N = torch.tensor(sorted(ends), dtype=torch.long, device=mask_EKT.device)
    draft_EKT, choice_EKT, has_run = batch.target_EKT, first_choice_EKT, False
    for _ in range(num_targets):
        changed = (choice_EKT != draft_EKT) & mask_EKT & _goes_on(draft_EKT, end_N)
        draft_EKT = torch.where(changed, choice_EKT, draft_EKT)
        # Whether a token is to be chosen anew: one in front of it has changed, and the answer goes on to it.
        anew = torch.zeros_like(mask_EKT)
        anew[..., 1:] = (changed.cumsum(dim=-1) > 0)[..., :-1]
        anew &= mask_EKT & _goes_on(draft_EKT, end_N)
        columns = anew.flatten(0, -2).any(dim=0).tolist()
        if True not in columns:
            break
        # A choice depends on what was fed before it and on nothing else, and so do keys and values. The first round
        # has none yet.
        first = columns.index(True) - 1 if has_run else 0
        behind_last = num_targets - columns[::-1].index(True)
        states = backbone.behind(prefix, batch, draft_EKT[..., :behind_last], memory, first)
        has_run = True
        chosen = anew[..., 1 + first : behind_last]
        choice_EKT = choice_EKT.clone()
        choice_EKT[..., 1 + first : behind_last][chosen] = backbone.head(states[chosen]).argmax(dim=-1)
    return draft_EKT


def _goes_on(tokens_EKT: Tensor, end_N: Tensor) -> Tensor:
    """Whether no token in front is an end."""
    if not len(end_N):
        return torch.ones_like(tokens_EKT, dtype=torch.bool)
    is_end = torch.isin(tokens_EKT, end_N).int()
    return is_end.cumsum(dim=-1) - is_end == 0
