"""Number of edits optimised together, so that an objective needs hardly more memory than the base editor's own loss.

ODEdit reads six sequences per edit, most editors read one, and most of a step's memory is activations saved for
backward (of negatives, only those in turn). Edits are independent, so fewer can be optimised at a time, as long as a
step stays large enough to hide its fixed overhead.
"""

from __future__ import annotations

import math

from torch import Tensor

from odedit import objectives
from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import Editor
from odedit.inputs.batch import EDIT, REPHRASE, EditBatch, EditParams, is_locality, unnumbered
from odedit.objectives.base import Objective
from odedit.runtime.budgets import budgets

_SAVED_PER_LAYER = 12
"""Values saved for backward per layer and position, in units of the hidden size (norm inputs, q, k, v, attention
output, FFN activations).
"""
_LAYERS_PER_OVERHEAD = 10
"""Layers and tensors whose kernel launches take as long as the rest of a step's fixed overhead."""


def width_like_native(
    backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix
) -> int:
    """Largest number of edits that save no more for backward than all edits of the batch under the native objective.

    The number is larger where so few edits would be too little work for the device. The estimate reads shapes only, so
    the same batch always has the same width.
    """
    limits, num_edits = budgets(batch.tokens_EKS.device), batch.num_edits
    saved_per_edit = _saved(backbone, editor, objective, batch, prefix)
    native = objectives.Objective(objectives.ObjectiveConfig("native"))
    native_total = num_edits * _saved(backbone, editor, native, batch, prefix)
    runs_only_read = _runs_only_read_positions(backbone, editor, objective.read(batch), prefix)
    budget = native_total + (limits.slack_head_values if runs_only_read else limits.slack_values)
    enough_work = math.ceil(limits.busy_flops / _flops(backbone, saved_per_edit))
    width = min(num_edits, max(1, budget // saved_per_edit, enough_work))
    return math.ceil(num_edits / math.ceil(num_edits / width))


def is_small(
    backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix, params: EditParams
) -> bool:
    """Whether fixed overhead is a large share of a step of all edits in the batch, so that a CUDA graph pays.

    The overhead grows with the number of layers and of updated tensors, which each launch their own kernels.
    """
    limits = budgets(batch.tokens_EKS.device)
    saved = batch.num_edits * _saved(backbone, editor, objective, batch, prefix)
    overhead = 1 + (backbone.num_layers - prefix.layer + len(params)) / _LAYERS_PER_OVERHEAD
    is_little_work = _flops(backbone, saved) < overhead * limits.busy_flops
    num_weights = sum(value.numel() for value in params.values())
    return is_little_work and num_weights < limits.graph_weights


def _flops(backbone: Backbone, saved: int) -> int:
    """FLOPs of a step: each saved value enters or leaves one product over the hidden size, forward and backward."""
    return 4 * backbone.hidden_size * saved


def _saved(backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix) -> int:
    """Values that one edit saves for backward: layer activations, and the logits of the tokens that the head reads."""
    batch = batch.select(objective.slots_at_once(objective.slots(editor, batch)))
    layers, read_EKT = backbone.num_layers - prefix.layer, objective.read(batch)
    runs_only_read = _runs_only_read_positions(backbone, editor, read_EKT, prefix)
    positions = (read_EKT if runs_only_read and read_EKT is not None else batch.tokens_EKS)[0].numel()
    shares = {slot: 1 for slot in batch.slots if unnumbered(slot) in (EDIT, REPHRASE)}
    if objective.compares and not objective.config.takes_turns:
        # Two distributions per token: edited and unedited. Those of negatives in turn are never stored.
        shares |= {slot: 2 for slot in batch.slots if is_locality(slot)}
    tokens = sum(count * int(batch.target_mask_EKT[:, batch.slots.index(slot)].sum()) for slot, count in shares.items())
    return positions * layers * _SAVED_PER_LAYER * backbone.hidden_size + math.ceil(
        tokens / batch.num_edits * backbone.vocabulary_size
    )


def _runs_only_read_positions(backbone: Backbone, editor: Editor, read_EKT: Tensor | None, prefix: Prefix) -> bool:
    """Whether a step computes only the positions that the objective reads."""
    is_last = prefix.at_ffn and prefix.layer == backbone.num_layers - 1
    return is_last and editor.positionwise and read_EKT is not None
