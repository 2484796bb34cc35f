"""Token sequences and image features, from which batches of changing pictures are assembled step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, ends_of
from odedit.backbones.common.generation import EXTRA_TOKENS, NO_TOKEN, generate
from odedit.editors.base import Editor
from odedit.inputs.batch import EditBatch, EditParams, Picture
from odedit.inputs.encoding import TokenSequence
from odedit.runtime.brief import brief
from odedit.runtime.kv_cache import KVCache

ASKED_AT_ONCE = 64
"""Questions that are answered together."""

_PER_SEQUENCE = (
    "tokens_EKS", "present_EK", "real_EKS", "prompt_EKS", "predict_EKT", "target_EKT", "target_mask_EKT", "picture_EK",
    "image_EKS", "white_EK",
)  # fmt: skip


@dataclass
class Features:
    """Image features of many pictures, in main memory.

    Attributes:
        backbone: Model that computes them.
        before_connector: Whether they are inputs of the connector.
        by_key: Features by picture key, `(L, width)`.
    """

    backbone: Backbone
    before_connector: bool = False
    by_key: dict[str, Tensor] = field(default_factory=dict)

    __repr__ = brief

    def add(self, pictures: Iterable[Picture]) -> None:
        """Computes the features of new pictures."""
        new = {picture.key: picture for picture in pictures if picture.key not in self.by_key}
        computed = self.backbone.image_features(list(new.values()), self.before_connector)
        self.by_key |= {key: feature.cpu() for key, feature in computed.items()}

    def pooled(self, keys: Sequence[str]) -> Tensor:
        """Mean feature of each picture, float32, [pictures, width]."""
        return torch.stack([self.by_key[key].float().mean(0) for key in keys])

    def batch(
        self, edit_ids: Sequence[str], slots: Sequence[str], cells: Sequence[Sequence[TokenSequence | None]]
    ) -> EditBatch:
        """Batch of an E x K grid of sequences."""
        keys = dict.fromkeys(cell.picture for row in cells for cell in row if cell is not None and cell.picture)
        device = self.backbone.device
        features = {key: self.by_key[key].to(device) for key in keys}
        return self.backbone.assemble(edit_ids, slots, cells, features, self.before_connector)

    def row(self, sequences: Sequence[TokenSequence]) -> EditBatch:
        """Batch of one edit with a slot for each sequence."""
        return self.batch(("all",), [str(number) for number in range(len(sequences))], [sequences])


def flat(batch: EditBatch) -> EditBatch:
    """The E x K sequences of a batch as those of a single edit: one set of parameters computes them all at once."""
    columns = {name: getattr(batch, name).flatten(0, 1).unsqueeze(0) for name in _PER_SEQUENCE}
    slots = tuple(f"{edit_id}/{slot}" for edit_id in batch.edit_ids for slot in batch.slots)
    lengths = tuple(length for _ in batch.edit_ids for length in batch.lengths)
    return replace(batch, edit_ids=("all",), slots=slots, lengths=lengths, **columns)


def with_answer(sequence: TokenSequence, answer: Sequence[int]) -> TokenSequence:
    """The sequence with other answer tokens."""
    return replace(sequence, tokens=[*sequence.tokens[: sequence.first_target], *answer])


def about(sequence: TokenSequence, picture: str | None) -> TokenSequence:
    """The sequence about another picture of as many positions."""
    return replace(sequence, picture=picture)


class OwnAnswer(NamedTuple):
    """Greedy answer of the unedited model to a question.

    Attributes:
        tokens: Its T tokens, the one that ends it included.
        states_TD: Final states of the unedited model that predict them.
    """

    tokens: list[int]
    states_TD: Tensor


@torch.no_grad()
def own_answers(features: Features, sequences: Sequence[TokenSequence], extra: int = EXTRA_TOKENS) -> list[OwnAnswer]:
    """The unedited model's answer to each sequence's question.

    An answer is cut off `extra` tokens beyond the sequence's own.
    """
    backbone, ends = features.backbone, ends_of(features.backbone)
    answers: list[OwnAnswer] = []
    # Sequences of like length together: less padding.
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number].tokens))
    for start in range(0, len(order), ASKED_AT_ONCE):
        batch = features.row([sequences[number] for number in order[start : start + ASKED_AT_ONCE]])
        kv_cache = KVCache(batch.target_EKT.shape[-1] + extra)
        prefix = backbone.prefix(batch, "layers.0.attention.out", kv_cache=kv_cache)
        branch = kv_cache.branch()
        read_EKT = batch.with_room(1, 0, backbone.max_positions).predict_EKT
        states_EKTD = backbone.suffix(prefix, read_EKT, branch)
        first_EKT = backbone.head(states_EKTD).argmax(dim=-1)
        tokens_EKT = generate(backbone, batch, prefix, branch, first_EKT, extra)
        own = [_until_end(tokens, ends) for tokens in tokens_EKT[0].tolist()]
        longest = max(map(len, own))
        extended = batch.with_room(extra, 0, backbone.max_positions)
        later_EKTD = backbone.target_states(
            backbone.with_room(prefix, extended), extended, tokens_EKT[..., :longest].clamp_min(0), branch
        )
        states_KTD = torch.cat([states_EKTD[..., :1, :], later_EKTD], dim=-2)[0].cpu()
        # Copies: a view would keep the states of the whole batch.
        answers += [
            OwnAnswer(tokens, states_TD[: len(tokens)].clone())
            for tokens, states_TD in zip(own, states_KTD, strict=True)
        ]
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]


def _until_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    answer: list[int] = []
    for token in tokens:
        if token == NO_TOKEN:
            break
        answer.append(token)
        if token in ends:
            break
    return answer


def usual_end(answers: Iterable[Sequence[int]], ends: frozenset[int]) -> int | None:
    """The token that ends most of the answers; None if none of them ends."""
    counts = Counter(answer[-1] for answer in answers if answer and answer[-1] in ends)
    return counts.most_common(1)[0][0] if counts else None


def edited_states(backbone: Backbone, editor: Editor, params: EditParams, batch: EditBatch) -> Tensor:
    """Final states of the edited model at the answers of a batch of one edit, `(1, K, T, D)`."""
    prefix = backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise)
    with editor.applied(backbone, params, batch):
        return backbone.suffix(prefix, batch.predict_EKT)
