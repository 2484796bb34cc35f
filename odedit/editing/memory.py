"""Memory that a model, its editor and a batch of edits need, by formula: nothing is loaded or run.

Counted are the model's weights; of every edit the trained values, their gradient, the optimiser's moments and what a
step makes new; and what the layers from the edited one upwards keep for the gradient. Not counted are the image tower
and the layers below, which run in parts of bounded size; networks of a learned multiplier, the trained weights of MEND
and UniKE, and the framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from odedit.backbones.base import Backbone, is_connector
from odedit.editors.base import Editor, EditSize, Sized
from odedit.inputs.batch import EDIT, SUPERVISION_SLOTS

GIB = 2**30
_FLOAT32 = 4
_HELD = {"sgd": 3, "adam": 5, "adamw": 5}
"""Float32 values per trained one while the gradient is computed: start, present, gradient; Adam's two moments."""
_STEP = {"sgd": 5, "adam": 9, "adamw": 9}
"""The same during a step, which makes new values: when the activations are freed."""
_LOGITS = 4
"""Float32 values per logit: itself, its logarithm, and their gradients."""


@dataclass(frozen=True)
class Needed:
    """Bytes.

    Attributes:
        model: Weights, in the type that they are loaded in.
        edits: Trained values of all edits that move together, with gradients and the optimiser's state; for large edits
            what a step takes beyond the activations, which are freed before it.
        activations: States below the edit, what the layers above it keep for the gradient, and the logits.
        num_edits: Number of edits that move together.
    """

    model: int
    edits: int
    activations: int
    num_edits: int

    @property
    def total(self) -> int:
        """Bytes of all together."""
        return self.model + self.edits + self.activations

    def __str__(self) -> str:
        edits = "edit" if self.num_edits == 1 else f"{self.num_edits} edits together"
        return (
            f"{in_gib(self.total)}: model {in_gib(self.model)}, {edits} {in_gib(self.edits)}, "
            f"activations {in_gib(self.activations)}"
        )


def needed(
    backbone: Backbone,
    editor: Editor,
    objective: Any,
    *,
    edits: int,
    positions: int,
    tokens: int,
    sequences: int | None = None,
) -> Needed:
    """Memory of a step of `edits` edits.

    Args:
        backbone: Model, possibly without weights.
        objective: Settings of the objective.
        positions: Positions of a sequence.
        tokens: Tokens of its answer.
        sequences: Sequences that a step reads for an edit; None: those of the objective.
    """
    parameters = list(backbone.model.parameters())
    size = editor.size(backbone, positions) if isinstance(editor, Sized) else EditSize(0)
    in_model_type = parameters[0].element_size()
    if sequences is None:
        sequences = len((objective.reads(editor) | {EDIT}).intersection(SUPERVISION_SLOTS))
    layer, at_ffn = _lowest(backbone, editor)
    only_read = editor.positionwise and at_ffn and layer == backbone.num_layers - 1
    kept = tokens if only_read else positions
    saved = _saved(backbone, layer, at_ffn, kept, tokens)
    states = in_model_type * sequences * kept * backbone.hidden_size
    logits = _FLOAT32 * _LOGITS * sequences * tokens * backbone.vocabulary_size
    held, step = (
        _FLOAT32 * (copies[editor.optimizer.kind] * size.trained + 2 * size.fixed) for copies in (_HELD, _STEP)
    )
    held += 2 * in_model_type * size.dense
    activations = in_model_type * sequences * saved + logits
    return Needed(
        model=sum(value.numel() * value.element_size() for value in parameters),
        edits=edits * max(held, step - activations),
        activations=edits * (activations + states),
        num_edits=edits,
    )


def in_gib(count: int) -> str:
    """A number of bytes in words.

    >>> in_gib(3 * 2**29), in_gib(3 * 2**19)
    ('1.5 GiB', '1.5 MiB')
    """
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def _lowest(backbone: Backbone, editor: Editor) -> tuple[int, bool]:
    """The lowest edited layer, and whether a step starts after its attention."""
    if any(is_connector(site) for site in editor.sites):
        return 0, False
    layer = min(backbone.layer_of(site) for site in editor.sites)
    return layer, all(".ffn." in site for site in editor.sites if backbone.layer_of(site) == layer)


def _saved(backbone: Backbone, first: int, at_ffn: bool, positions: int, tokens: int) -> int:
    """Values that the layers from the first edited one on keep for a sequence.

    Kept are the inputs of norms, queries, keys, values, attention's output, and the values around the nonlinearity; a
    frozen matrix keeps nothing. After its keys and values, the last layer runs only where an answer is read.
    """
    last = backbone.num_layers - 1
    queries, within = (backbone.site(f"layers.{last}.{part}").in_features for part in ("attention.out", "ffn.out"))
    rows = [
        len(backbone.site(f"layers.{last}.{part}").weight)
        for part in backbone.parts if part.startswith("attention.") and part != "attention.out"
    ]  # fmt: skip
    width, shared = backbone.hidden_size, sum(rows) - queries
    inner = (3 if {"ffn.gate", "ffn.gate_in"}.intersection(backbone.parts) else 2) * within
    whole = 2 * width + 2 * queries + shared + inner
    total = 0
    for layer in range(first, last + 1):
        if layer == first and at_ffn:
            total += positions * inner
        elif layer == last:
            total += positions * (width + shared) + tokens * (whole - width - shared)
        else:
            total += positions * whole
    return total
