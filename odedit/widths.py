"""How many edits move together, so that an objective takes hardly more memory than the base editor's own loss.

ODEdit reads six sequences of an edit where most editors read one, and what a sequence keeps for its gradient is most of
what a step holds. Edits are independent, so fewer of them may move at a time; each still is work enough.
"""

from __future__ import annotations

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import Editor
from odedit.edits import EDIT, EditBatch, is_locality
from odedit.objective import Objective, ObjectiveConfig

_KEPT = 12
"""Times the hidden size that a layer keeps of a position: what enters its norms, queries, keys, values, what attention
gives, and the four times wider inside of the feed-forward half.
"""
_LEEWAY = {"cpu": 2**24, "cuda": 2**28}
"""Bytes more than the base editor's loss takes that do not matter."""


def width_like_native(
    backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix
) -> int:
    """Edits that keep no more for their gradients than all edits of the batch would under the native objective.

    An estimate from the shapes alone, so that the same batch always moves alike.
    """
    of_all = batch.num_edits * _kept_bytes(backbone, editor, Objective(ObjectiveConfig(name="native")), batch, prefix)
    of_one = _kept_bytes(backbone, editor, objective, batch, prefix)
    room = of_all + _LEEWAY.get(batch.tokens_EKS.device.type, _LEEWAY["cuda"])
    return batch.num_edits if of_one * batch.num_edits <= room else max(1, room // of_one)


def _kept_bytes(backbone: Backbone, editor: Editor, objective: Objective, batch: EditBatch, prefix: Prefix) -> int:
    """Of one edit: what layers keep, and distributions over the vocabulary of the tokens whose distribution is read."""
    batch = batch.select(objective.slots(editor, batch))
    layers, read_EKT = backbone.num_layers - prefix.layer, objective.read(batch)
    is_read_alone = layers == 1 and prefix.at_ffn and editor.positionwise and read_EKT is not None
    positions = (read_EKT if is_read_alone and read_EKT is not None else batch.tokens_EKS)[0].numel()
    hidden = positions * layers * _KEPT * backbone.hidden_size * prefix.hidden_RSD.element_size()
    # Of an unrelated prompt's token the unedited one as well.
    shares = (
        {EDIT: 1} if objective.config.name == "native" else {EDIT: 1} | {s: 2 for s in batch.slots if is_locality(s)}
    )
    tokens = sum(count * int(batch.target_mask_EKT[:, batch.slots.index(slot)].sum()) for slot, count in shares.items())
    return hidden + 4 * backbone.vocabulary_size * -(-tokens // batch.num_edits)
