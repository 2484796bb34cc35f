"""The operations that an edit's mathematics needs, by formula, and how fast this machine multiplies matrices.

A floor, not an estimate: only matrix products are counted, only over positions that are there, every picture once,
everything below the edit once, and above it only what a loss or a figure reads. Norms, softmax, losses over the
vocabulary, updates and copies count as nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from odedit.backbones import is_connector
from odedit.edits import EDIT, EditBatch, is_locality

FORWARD, BACKWARD = 2, 2
"""Operations of a multiplication with its addition, forward; and backward through a weight that is frozen."""


@dataclass(frozen=True)
class Shapes:
    """Widths and depths of a BLIP-2, from its configuration."""

    width: int
    ffn: int
    layers: int
    vocabulary: int
    image: float  # operations of one picture, tower to projection

    @classmethod
    def of(cls, model: Any) -> Shapes:
        text, vision, qformer = model.config.text_config, model.config.vision_config, model.config.qformer_config
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        tower = vision.num_hidden_layers * _layer(patches, vision.hidden_size, vision.intermediate_size, patches)
        tower += patches * 3 * vision.patch_size**2 * vision.hidden_size
        queries, wide = model.config.num_query_tokens, qformer.hidden_size
        crossing = len(range(0, qformer.num_hidden_layers, qformer.cross_attention_frequency))
        q = qformer.num_hidden_layers * _layer(queries, wide, qformer.intermediate_size, queries)
        # Cross-attention: queries and outputs of the queries, keys and values of the patches.
        q += crossing * (2 * queries * wide**2 + 2 * patches * vision.hidden_size * wide + 2 * queries * patches * wide)
        q += queries * wide * text.hidden_size
        return cls(text.hidden_size, text.ffn_dim, text.num_hidden_layers, text.vocab_size, FORWARD * (tower + q))


def _layer(positions: float, width: int, ffn: int, seen: float) -> float:
    """Multiplications of a transformer layer: projections, attention over `seen` positions each, feed-forward."""
    return positions * (4 * width**2 + 2 * width * ffn + 2 * seen * width)


class Floor:
    """Operations per edit of one editor on one batch.

    Args:
        supervision: The sequences that the objective reads, and no other.
        steps: Primal steps; one more forward sees where they led.
    """

    def __init__(self, model: Any, editor: Any, supervision: EditBatch, evaluation: EditBatch, steps: int) -> None:
        if any(is_connector(site) for site in editor.sites):
            raise ValueError("sites of the connector are not counted here.")
        self._shapes, self._editor, self._steps = Shapes.of(model), editor, steps
        self._supervision, self._evaluation = supervision, evaluation
        number, self._at_ffn = editor_layer(editor, self._shapes.layers)
        self._layer = number

    def features(self) -> float:
        return self._per_edit(len(self._evaluation.features_NLD) * self._shapes.image)

    def prefix(self) -> float:
        return self._per_edit(sum(self._below(length) for length in _lengths(self._supervision)))

    def steps(self) -> float:
        forward, backward = self._above(self._supervision)
        return self._per_edit((self._steps + 1) * forward + self._steps * backward)

    def evaluation(self) -> float:
        """Teacher-forced figures before and after, the published locality at every position, one round of greedy
        generation before and after.
        """
        batch, s = self._evaluation, self._shapes
        below = sum(self._below(length) for length in _lengths(batch))
        above = sum(self._whole_above(length) for length in _lengths(batch))
        compared = [k for k, name in enumerate(batch.slots) if is_locality(name)]
        everywhere = int(batch.real_EKS[:, compared].sum())
        others = int(batch.target_mask_EKT.sum()) - int(batch.target_mask_EKT[:, compared].sum())
        heads = FORWARD * (everywhere + others) * s.width * s.vocabulary
        fed = int(batch.target_mask_EKT[..., 1:].sum())
        generation = FORWARD * (
            s.layers * _layer(fed, s.width, s.ffn, batch.tokens_EKS.shape[-1]) + fed * s.width * s.vocabulary
        )
        return self._per_edit(below + 2 * (above + heads + generation))

    def total(self) -> float:
        return self.features() + self.prefix() + self.steps() + self.evaluation()

    def _per_edit(self, operations: float) -> float:
        return operations / self._supervision.num_edits

    def _below(self, length: int) -> float:
        """Layers under the edit, attention of the edited layer included where the edit is behind it."""
        s = self._shapes
        whole = self._layer * _layer(length, s.width, s.ffn, (length + 1) / 2)
        attention = length * (4 * s.width**2 + (length + 1) * s.width) if self._at_ffn else 0
        return FORWARD * (whole + attention)

    def _whole_above(self, length: int) -> float:
        s = self._shapes
        first = length * 2 * s.width * s.ffn if self._at_ffn else _layer(length, s.width, s.ffn, (length + 1) / 2)
        rest = (s.layers - 1 - self._layer) * _layer(length, s.width, s.ffn, (length + 1) / 2)
        return FORWARD * (first + rest)

    def _above(self, batch: EditBatch) -> tuple[float, float]:
        """Forward and backward of one step: from the site to the head, at the positions that matter."""
        s, name = self._shapes, type(self._editor).__name__
        read = int(batch.target_mask_EKT.sum())
        frozen = 0.0
        if self._layer == s.layers - 1:  # only what is read
            frozen += FORWARD * read * 2 * s.width * s.ffn
        else:
            for length in _lengths(batch):
                frozen += self._whole_above(length)
            # The last layer is whole in its keys and values only.
            for length, tokens in zip(_lengths(batch), _targets(batch), strict=True):
                spared = length - tokens
                frozen -= FORWARD * spared * (2 * s.width**2 + 2 * s.width * s.ffn + (length + 1) * s.width)
        edit = batch.slots.index(EDIT)
        compared = [k for k, slot in enumerate(batch.slots) if is_locality(slot)] if len(batch.slots) > 1 else []
        rows = int(batch.target_mask_EKT[:, [edit, *compared]].sum())
        head = FORWARD * rows * s.width * s.vocabulary
        positions = read if self._layer == s.layers - 1 else int(batch.real_EKS.sum())
        own = FORWARD * positions * self._own_weights(name)
        # Gradients pass through everything frozen above the site once, and to the edit's own weights once more;
        # T-Patcher stands beside the network, which needs no gradient.
        through = 0.0 if name == "TPatcher" else frozen - FORWARD * positions * s.width * s.ffn
        return frozen + head + own, through + head + own

    def _own_weights(self, name: str) -> float:
        s = self._shapes
        if name == "TPatcher":
            return 2 * self._editor.config.max_neurons * s.width
        if name == "LoRA":
            return (s.width + s.ffn) * self._editor.config.rank
        return s.width * s.ffn


def editor_layer(editor: Any, layers: int) -> tuple[int, bool]:
    """The lowest edited layer, and whether it is edited behind its attention."""
    located = [(int(site.split(".")[1]) % layers, site.split(".")[2]) for site in editor.sites]
    lowest = min(number for number, _ in located)
    return lowest, all(part == "ffn" for number, part in located if number == lowest)


def _lengths(batch: EditBatch) -> list[int]:
    return [int(n) for n in batch.real_EKS.sum(-1).flatten().tolist() if n]


def _targets(batch: EditBatch) -> list[int]:
    lengths = batch.real_EKS.sum(-1).flatten().tolist()
    return [int(t) for t, n in zip(batch.target_mask_EKT.sum(-1).flatten().tolist(), lengths, strict=True) if n]


def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """Operations per second of a large matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        _wait(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
