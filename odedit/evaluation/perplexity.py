"""Mean NLL of a text under the text model, without a picture and without a prompt's template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from odedit.backbones.base import Backbone, is_connector
from odedit.inputs.batch import EditBatch
from odedit.inputs.encoding import TokenSequence, assemble
from odedit.runtime.budgets import budgets

WINDOW = 1024
"""Longest window in tokens; a model with fewer positions reads shorter ones."""
_TOKENS_AT_ONCE = 4096


def windows(backbone: Backbone, text: str, sites: Sequence[str] = ()) -> Iterator[EditBatch]:
    """The text in batches of windows that do not overlap, each after the tokenizer's begin token if it has one.

    Args:
        sites: Sites of the edits that will be applied.
    """
    tokenizer = backbone.processor.tokenizer
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    length = min(WINDOW, backbone.max_positions)
    tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    size = length - len(begin)
    sequences = [[*begin, *tokens[start : start + size]] for start in range(0, len(tokens), size)]
    # The first token of a window is given, so a window of one token has nothing to predict.
    cells = [TokenSequence(sequence, first_target=1) for sequence in sequences if len(sequence) > 1]
    at_once = max(1, _TOKENS_AT_ONCE // length)
    before = any(map(is_connector, sites))
    width = backbone.vision_width if before else getattr(backbone, "feature_width", backbone.hidden_size)
    pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    for start in range(0, len(cells), at_once):
        rows = [[cell] for cell in cells[start : start + at_once]]
        ids = [f"window-{start + row}" for row in range(len(rows))]
        yield replace(assemble(ids, ["rel"], rows, {}, pad, width, backbone.device), before_connector=before)


@torch.no_grad()
def total_nll(
    backbone: Backbone, batch: EditBatch, sites: Sequence[str], positionwise: bool = True
) -> tuple[float, int]:
    """NLL in nats of all predicted tokens, with the currently applied edits, and the number of these tokens."""
    prefix = backbone.prefix(batch, *sites, positionwise=positionwise)
    states_MD = backbone.suffix(prefix, batch.predict_EKT)[batch.target_mask_EKT]
    target_M = batch.target_EKT[batch.target_mask_EKT]
    at_once = max(1, budgets(states_MD.device).evaluated_logits // backbone.vocabulary_size)
    nll: list[Tensor] = [
        functional.cross_entropy(backbone.head(states), target, reduction="sum").double()
        for states, target in zip(states_MD.split(at_once), target_M.split(at_once), strict=True)
    ]
    return float(torch.stack(nll).sum()), len(target_M)
