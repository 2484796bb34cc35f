"""Lower bound of an edit's FLOPs, by formula, and the matrix product rate of this machine.

Only matrix products are counted: over positions without padding, every picture once, layers below the edit once, and
above it only the positions that a loss or a score reads. Norms, softmax, losses over the vocabulary, updates and copies
count 0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from odedit.backbones import is_connector
from odedit.evaluation.scores import EvaluationConfig
from odedit.inputs.batch import EDIT, REPHRASE, EditBatch, is_locality

FORWARD, BACKWARD = 2, 2
"""FLOPs of a multiply-add: forward, and backward through a frozen weight."""

EVERYTHING = EvaluationConfig()


@dataclass(frozen=True)
class Shapes:
    """Widths and depths of a BLIP-2, from its configuration.

    Attributes:
        width, ffn, layers, vocabulary: Hidden size, feed-forward size, layers and vocabulary size of the text model.
        tower: Multiplications of the image tower per picture.
        connector: Multiplications of the Q-Former and the projection per picture.
    """

    width: int
    ffn: int
    layers: int
    vocabulary: int
    tower: float
    connector: float

    @classmethod
    def of(cls, model: Any) -> Shapes:
        text, vision, qformer = model.config.text_config, model.config.vision_config, model.config.qformer_config
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        tower = vision.num_hidden_layers * _layer(patches, vision.hidden_size, vision.intermediate_size, patches)
        tower += patches * 3 * vision.patch_size**2 * vision.hidden_size
        queries, wide = model.config.num_query_tokens, qformer.hidden_size
        crossing = len(range(0, qformer.num_hidden_layers, qformer.cross_attention_frequency))
        q = qformer.num_hidden_layers * _layer(queries, wide, qformer.intermediate_size, queries)
        # Cross-attention: query and output projections of the queries, key and value projections of the patches.
        q += crossing * (2 * queries * wide**2 + 2 * patches * vision.hidden_size * wide + 2 * queries * patches * wide)
        q += queries * wide * text.hidden_size
        return cls(text.hidden_size, text.ffn_dim, text.num_hidden_layers, text.vocab_size, tower, q)


def _layer(positions: float, width: int, ffn: int, seen: float) -> float:
    """Multiplications of a transformer layer: projections, attention over `seen` positions on average, feed-forward."""
    return positions * (4 * width**2 + 2 * width * ffn + 2 * seen * width)


class Floor:
    """FLOPs per edit of one editor on one batch.

    Args:
        supervision: Sequences that the objective reads.
        steps: Number of primal steps; one more forward evaluates the result.
        shown: Sequences that a single step reads; None: all.
    """

    def __init__(
        self,
        backbone: Any,
        editor: Any,
        supervision: EditBatch,
        evaluation: EditBatch,
        steps: int,
        shown: EditBatch | None = None,
    ) -> None:
        self._shapes, self._backbone, self._editor, self._steps = Shapes.of(backbone.model), backbone, editor, steps
        self._supervision, self._evaluation = supervision, evaluation
        self._shown = supervision if shown is None else shown
        self._name = type(editor).__name__
        self._is_connector = any(is_connector(site) for site in editor.sites)
        # UniKE's knowledge states in front of the feed-forward half of its lowest layer are fixed: part of the prefix.
        self._layer, self._at_ffn = lowest(editor, self._shapes.layers)

    def features(self) -> float:
        s, pictures = self._shapes, len(self._evaluation.features_NLD)
        # An edit of the connector runs it in every step instead.
        return self._per_edit(FORWARD * pictures * (s.tower + (0 if self._is_connector else s.connector)))

    def prefix(self) -> float:
        return self._per_edit(sum(self._below(length) for length in _lengths(self._supervision)))

    def steps(self) -> float:
        """FLOPs of the loop, and of the editor before it."""
        one_way, once = self._above(self._shown)
        total = once + (2 * self._steps + 1) * one_way
        edit = self._supervision.select((EDIT,))
        if self._name == "MEND":
            # One gradient of the edit, and the hypernetwork on every token that has one.
            one_way, once = self._above(edit)
            total += once + 2 * (one_way - FORWARD * self._own(edit)) + self._hypernetwork(edit)
        if self._name == "Unike":
            # The demonstration, without and with knowledge states.
            total += 2 * sum(self._whole_above(length) for length in _lengths(edit))
        return self._per_edit(total)

    def evaluation(self, config: EvaluationConfig = EVERYTHING) -> float:
        """FLOPs of teacher-forced scores before and after, and by `config` of the published locality at every position
        and of one round of greedy generation before and after.
        """
        batch, s = self._evaluation, self._shapes
        below = sum(self._below(length) for length in _lengths(batch))
        compared = [k for k, name in enumerate(batch.slots) if is_locality(name)]
        where = batch.real_EKS if config.mmedit else batch.target_mask_EKT
        everywhere = int(where[:, compared].sum())
        above = 0.0
        for name in batch.slots:
            is_whole = config.mmedit and is_locality(name)
            probe = batch.select((name,))
            for length, tokens in zip(_lengths(probe), _targets(probe), strict=True):
                above += self._read_above(length, length if is_whole else tokens)
        others = int(batch.target_mask_EKT.sum()) - int(batch.target_mask_EKT[:, compared].sum())
        heads = FORWARD * (everywhere + others) * s.width * s.vocabulary
        fed = int(batch.target_mask_EKT[..., 1:].sum())
        generation = FORWARD * (
            s.layers * _layer(fed, s.width, s.ffn, batch.tokens_EKS.shape[-1]) + fed * s.width * s.vocabulary
        )
        generation *= config.generate
        return self._per_edit(below + 2 * (above + heads + generation) + FORWARD * self._own(batch))

    def total(self, config: EvaluationConfig = EVERYTHING) -> float:
        return self.features() + self.prefix() + self.steps() + self.evaluation(config)

    def _per_edit(self, operations: float) -> float:
        return operations / self._supervision.num_edits

    def _below(self, length: int) -> float:
        """FLOPs below the site: the layers, and the edited layer's attention if the site is behind it."""
        s = self._shapes
        whole = self._layer * _layer(length, s.width, s.ffn, (length + 1) / 2)
        attention = length * (4 * s.width**2 + (length + 1) * s.width) if self._at_ffn else 0
        return FORWARD * (whole + attention)

    def _read_above(self, length: int, read: int) -> float:
        """FLOPs from the site to the end, where `read` positions of the last layer are read."""
        s = self._shapes
        if self._layer == s.layers - 1 and self._at_ffn:
            return FORWARD * read * 2 * s.width * s.ffn
        spared = (length - read) * (2 * s.width**2 + 2 * s.width * s.ffn + (length + 1) * s.width)
        # The last layer needs keys and values at all positions, the rest only at those read.
        return self._whole_above(length) - FORWARD * spared

    def _whole_above(self, length: int) -> float:
        s = self._shapes
        first = length * 2 * s.width * s.ffn if self._at_ffn else _layer(length, s.width, s.ffn, (length + 1) / 2)
        others = (s.layers - 1 - self._layer) * _layer(length, s.width, s.ffn, (length + 1) / 2)
        return FORWARD * (first + others)

    def _above(self, batch: EditBatch) -> tuple[float, float]:
        """FLOPs of one step's forward from the site to the head at the read positions (backward takes as many), and
        FLOPs that are needed once for all steps.
        """
        s = self._shapes
        read = int(batch.target_mask_EKT.sum())
        is_last = self._at_ffn and self._layer == s.layers - 1
        frozen = sum(
            self._read_above(length, tokens) for length, tokens in zip(_lengths(batch), _targets(batch), strict=True)
        )
        by_head = [k for k, slot in enumerate(batch.slots) if slot in (EDIT, REPHRASE) or is_locality(slot)]
        head = FORWARD * int(batch.target_mask_EKT[:, by_head].sum()) * s.width * s.vocabulary
        own = FORWARD * self._own(batch)
        # Backward passes through the frozen weights above the site, and to the trained weights once more.
        positions = read if is_last else int(batch.real_EKS.sum())
        below_site = {"ffn.in": 1, "ffn.out": 2}.get(self._lowest_part(), 0) * s.width * s.ffn
        # Frozen products up to and including the edited matrix are the same in every step.
        same = FORWARD * positions * below_site
        return frozen - same + head + own, same

    def _lowest_part(self) -> str:
        if self._name in ("TPatcher", "Unike"):
            return "ffn.out"  # their neurons are parallel to the network and add to its output
        parts = [site.split(".", 2)[2] for site in self._editor.sites if not is_connector(site)]
        return min(parts) if parts and self._at_ffn else ""

    def _own(self, batch: EditBatch) -> float:
        """Multiplications with the edit's own parameters, over the positions that are computed."""
        s, last = self._shapes, self._shapes.layers - 1
        num_real, read = int(batch.real_EKS.sum()), int(batch.target_mask_EKT.sum())
        if self._name == "TPatcher":
            return float(read * 2 * self._editor.config.max_neurons * s.width)
        if self._name == "Unike":
            config = self._editor.config
            encoders = 2 * (s.width * config.encoder_width + config.encoder_width * config.code_width)
            each = 2 * config.neurons * s.width + 2 * config.memory * s.width + encoders
            return float((num_real * (config.num_layers - 1) + read) * each)
        if self._is_connector:
            return float(int(batch.image_EKS.any(-1).sum()) * s.connector)
        total = 0.0
        for site in self._editor.sites:
            out, width = self._backbone.site(site).weight.shape
            positions = read if int(site.split(".")[1]) % s.layers == last and "ffn" in site else num_real
            if self._name in ("LoRA", "MEND"):
                inner = self._editor.config.rank if self._name == "LoRA" else self._tokens_of_edit(positions == read)
                total += positions * inner * (out + width)
            else:
                total += positions * out * width
        return total

    def _tokens_of_edit(self, is_last: bool) -> float:
        """Number of tokens with a gradient, averaged over the edits."""
        edit = self._supervision.select((EDIT,))
        return self._per_edit(int((edit.target_mask_EKT if is_last else edit.real_EKS).sum()))

    def _hypernetwork(self, edit: EditBatch) -> float:
        total = 0.0
        for site in self._editor.sites:
            width = sum(self._backbone.site(site).weight.shape)
            is_last = int(site.split(".")[1]) % self._shapes.layers == self._shapes.layers - 1
            tokens = int((edit.target_mask_EKT if is_last else edit.real_EKS).sum())
            total += FORWARD * tokens * 2 * 2 * min(self._editor.config.rank, width) * width
        return total


def lowest(editor: Any, layers: int) -> tuple[int, bool]:
    """Lowest edited layer, and whether it is edited behind its attention; the first layer for a connector's edit."""
    if any(is_connector(site) for site in editor.sites):
        return 0, False
    located = [(int(site.split(".")[1]) % layers, site.split(".")[2]) for site in editor.sites]
    first = min(number for number, _ in located)
    return first, type(editor).__name__ == "Unike" or all(part == "ffn" for number, part in located if number == first)


def _lengths(batch: EditBatch) -> list[int]:
    return [int(n) for n in batch.real_EKS.sum(-1).flatten().tolist() if n]


def _targets(batch: EditBatch) -> list[int]:
    lengths = batch.real_EKS.sum(-1).flatten().tolist()
    return [int(t) for t, n in zip(batch.target_mask_EKT.sum(-1).flatten().tolist(), lengths, strict=True) if n]


def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started))
    return best


def wait(device: str) -> None:
    """Synchronises with a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
