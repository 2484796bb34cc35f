"""How many edits move together, so that an objective takes hardly more memory than the base editor's own loss.

ODEdit reads six sequences of an edit where most editors read one, and what a sequence keeps for its gradient is most of
what a step holds (hard negatives whose turn it is not keep nothing). Edits are independent, so fewer of them may move
at a time; each still is work enough.
"""

from __future__ import annotations

import math

from torch import Tensor

from odedit import objectives
from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import Editor
from odedit.inputs.batch import EDIT, REPHRASE, EditBatch, EditParams, is_locality
from odedit.objectives.base import Objective
from odedit.runtime.budgets import budgets

_KEPT = 12
"""Times the hidden size that a layer keeps of a position: what enters its norms, queries, keys, values, what attention
gives, and the four times wider inside of the feed-forward half.
"""
_FEW = 10
"""Layers and tensors whose kernels take as long to start as the rest of a step."""


def width_like_native(
    backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix
) -> int:
    """Edits that keep no more for their gradients than all edits of the batch would under the native objective.

    More where so few would be too little work; then memory is no matter. An estimate from the shapes alone, so that the
    same batch always moves alike.
    """
    limits, num_edits = budgets(batch.tokens_EKS.device), batch.num_edits
    of_one = _kept(backbone, editor, objective, batch, prefix)
    native = objectives.Objective(objectives.ObjectiveConfig("native"))
    of_all = num_edits * _kept(backbone, editor, native, batch, prefix)
    is_read_alone = _is_read_alone(backbone, editor, objective.read(batch), prefix)
    room = of_all + (limits.slack_head_values if is_read_alone else limits.slack_values)
    busy = math.ceil(limits.busy_flops / _operations(backbone, of_one))
    width = min(num_edits, max(1, room // of_one, busy))
    return math.ceil(num_edits / math.ceil(num_edits / width))


def is_small(
    backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix, params: EditParams
) -> bool:
    """Whether what a step costs however small it is, is much of what a step of all edits of the batch costs.

    That grows with the layers it passes and with the tensors it moves: each has its kernels to be started.
    """
    limits = budgets(batch.tokens_EKS.device)
    kept = batch.num_edits * _kept(backbone, editor, objective, batch, prefix)
    started = 1 + (backbone.num_layers - prefix.layer + len(params)) / _FEW
    is_little_work = _operations(backbone, kept) < started * limits.busy_flops
    return is_little_work and sum(value.numel() for value in params.values()) < limits.graph_weights


def _operations(backbone: Backbone, kept: int) -> int:
    """Of a step: a value that is kept is the result of a product over the hidden size, or enters one, both ways."""
    return 4 * backbone.hidden_size * kept


def _kept(backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix) -> int:
    """Values of one edit: of layers, and distributions over the vocabulary of the tokens that the head reads."""
    batch = batch.select(objective.slots_at_once(objective.slots(editor, batch)))
    layers, read_EKT = backbone.num_layers - prefix.layer, objective.read(batch)
    is_read_alone = _is_read_alone(backbone, editor, read_EKT, prefix)
    positions = (read_EKT if is_read_alone and read_EKT is not None else batch.tokens_EKS)[0].numel()
    shares = {slot: 1 for slot in (EDIT, REPHRASE) if slot in batch.slots}
    if objective.compares and not objective.config.takes_turns:
        # Of an unrelated prompt's token the unedited distribution as well; those of pictures in turn are never kept.
        shares |= {slot: 2 for slot in batch.slots if is_locality(slot)}
    tokens = sum(count * int(batch.target_mask_EKT[:, batch.slots.index(slot)].sum()) for slot, count in shares.items())
    return positions * layers * _KEPT * backbone.hidden_size + math.ceil(
        tokens / batch.num_edits * backbone.vocabulary_size
    )


def _is_read_alone(backbone: Backbone, editor: Editor, read_EKT: Tensor | None, prefix: Prefix) -> bool:
    """Whether a step runs at the positions that are read and at no other."""
    is_last = prefix.at_ffn and prefix.layer == backbone.num_layers - 1
    return is_last and editor.positionwise and read_EKT is not None
