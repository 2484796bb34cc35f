"""Greedy generation by fixed-point iteration, and the end of an answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, ends_of
from odedit.inputs.batch import EditBatch
from odedit.runtime.budgets import budgets
from odedit.runtime.kv_cache import KVCache

EXTRA_TOKENS = 8
"""Tokens beyond its target's length after which a generated answer is cut off."""


NO_TOKEN = -1
"""Marks a token that was not generated: the answer is cut off there, or the model takes no more positions."""


def generate(
    backbone: Backbone,
    batch: EditBatch,
    prefix: Prefix,
    kv_cache: KVCache,
    first_choice_EKT: Tensor,
    extra_tokens: int = EXTRA_TOKENS,
) -> Tensor:
    """Greedily generated answers of every probe, `(E, K, T + extra_tokens)`, with `NO_TOKEN` after the last token.

    `until_end` cuts an answer at its end.

    Args:
        kv_cache: Keys and values of a forward, see `greedy`.
        first_choice_EKT: The model's choices given the target: its T tokens, and the token after it, `(E, K, T + 1)`.
        extra_tokens: Tokens beyond its target's length after which an answer is cut off.
    """
    ends = ends_of(backbone)
    end = min(ends)
    extended = batch.with_room(extra_tokens, end, backbone.max_positions)
    count_EK1 = batch.target_mask_EKT.sum(dim=-1, keepdim=True)
    index_N = torch.arange(extended.target_EKT.shape[-1], device=count_EK1.device)
    choice_EKN = torch.nn.functional.pad(first_choice_EKT, (0, extra_tokens - 1)).where(index_N <= count_EK1, end)
    tokens_EKN = greedy(backbone, extended, backbone.with_room(prefix, extended), kv_cache, choice_EKN, ends)
    return tokens_EKN.where(extended.target_mask_EKT, NO_TOKEN)


def until_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """A generated answer without its end token and everything after it, and whether it has an end token."""
    end = next((index for index, token in enumerate(tokens) if token in ends or token == NO_TOKEN), None)
    return list(tokens[:end]), end is not None and tokens[end] != NO_TOKEN


@torch.no_grad()
def greedy(
    backbone: Backbone,
    batch: EditBatch,
    prefix: Prefix,
    kv_cache: KVCache,
    first_choice_EKT: Tensor,
    ends: Collection[int] = (),
) -> Tensor:
    """Greedily generated tokens of every probe, as many as its target has, `(E, K, T)`.

    Fixed-point iteration: feed a draft, replace it by the model's choices, repeat. A token is final as soon as all
    tokens before it are, so at most T rounds give exactly the tokens of one-by-one decoding, and two or three usually
    suffice. A round computes only the target's positions, which attend to the prompt through the KV cache. Where two
    rounds do not suffice, the draft is poor, and what follows a token that changes is computed for nothing: further
    rounds compute a `_Window`.

    Args:
        kv_cache: Keys and values of a forward of `prefix` and suffix; for an edited model filled, and used here,
            inside the same `applied` block.
        first_choice_EKT: The model's choices given the target, which is the first draft.
        ends: Tokens that end an answer; tokens after the first of them are not generated and have no meaning.
    """
    mask_EKT, num_targets = batch.target_mask_EKT, batch.target_EKT.shape[-1]
    end_N = torch.tensor(sorted(ends), dtype=torch.long, device=mask_EKT.device)
    draft_EKT, choice_EKT, window = batch.target_EKT, first_choice_EKT, _Window(num_targets)
    # Choices that were made for other tokens before them than those of the draft.
    stale_EKT = torch.zeros_like(mask_EKT)
    while True:
        changed = (choice_EKT != draft_EKT) & ~stale_EKT & mask_EKT & _goes_on(draft_EKT, end_N)
        draft_EKT = torch.where(changed, choice_EKT, draft_EKT)
        stale_EKT[..., 1:] |= (changed.cumsum(dim=-1) > 0)[..., :-1]
        stale_EKT &= mask_EKT & _goes_on(draft_EKT, end_N)
        columns = stale_EKT.flatten(0, -2).any(dim=0).tolist()
        if True not in columns:
            return draft_EKT
        first, stop = window.of(columns, bool(changed.any()))
        states = backbone.target_states(prefix, batch, draft_EKT[..., :stop], kv_cache, first)
        computed = slice(1 + first, stop)
        chosen = stale_EKT[..., computed]
        choice_EKT = choice_EKT.clone()
        choice_EKT[..., computed][chosen] = _first_choices(backbone, states[chosen])
        stale_EKT[..., computed] = False


def _first_choices(backbone: Backbone, states_MD: Tensor) -> Tensor:
    """Most likely token at each of M states; the logits of some states at a time, which memory holds."""
    at_once = max(1, budgets(states_MD.device).evaluated_logits // backbone.vocabulary_size)
    return torch.cat([backbone.head(part).argmax(dim=-1) for part in states_MD.split(at_once)])


class _Window:
    """Columns of tokens that a round of `greedy` computes.

    The first two rounds compute all that may change. Later ones compute one, and twice as many after each round that
    has confirmed its draft.
    """

    def __init__(self, num_targets: int) -> None:
        self._num_targets, self._rounds, self._size = num_targets, 0, 1

    def of(self, stale: Sequence[bool], has_changed: bool) -> tuple[int, int]:
        """First token to feed, and the end of the columns to choose.

        Args:
            stale: Whether a row needs the column's token chosen anew.
            has_changed: Whether the last round's choices differ from the draft.
        """
        self._rounds += 1
        # Keys and values depend only on the tokens before them, so a round starts at the first that changed. The first
        # round has no keys and values of target tokens yet.
        first = stale.index(True) - 1 if self._rounds > 1 else 0
        stop = self._num_targets - list(reversed(stale)).index(True)
        if self._rounds <= 2:
            return first, stop
        self._size = 1 if has_changed else 2 * self._size
        return first, min(stop, first + 1 + self._size)


def _goes_on(tokens_EKT: Tensor, end_N: Tensor) -> Tensor:
    """True at tokens with no end token before them, `(E, K, T)`."""
    if not len(end_N):
        return torch.ones_like(tokens_EKT, dtype=torch.bool)
    is_end = torch.isin(tokens_EKT, end_N).int()
    return is_end.cumsum(dim=-1) - is_end == 0
