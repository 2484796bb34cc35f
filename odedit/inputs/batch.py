"""Edit requests, with their pictures and probes, and the batch of tensors that a model reads.

Suffixes of tensor names, which give their shapes everywhere:

    E  edits in a batch            K  sequences of one edit (`EditBatch.slots`)
    S  positions of a sequence     T  target tokens of a sequence
    D  hidden size                 V  vocabulary
    L  positions of an image       Q  kernel bandwidths        P  sketch size

Every edit has the same number K of sequences, absent ones masked, so that a hook can view a module's input as
`(E, K, S, D)` and compute with one set of edited parameters per edit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from odedit.evaluation import columns
from odedit.inputs.html import picture_html, request_html
from odedit.runtime.brief import brief
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import inverse_index, select, spread

EditParams = dict[str, Tensor]
"""Edited parameters phi_e by name; axis 0 of every tensor is the edit."""

EDIT = "edit"
SUPERVISION_SLOTS = (
    EDIT,
    "text_rephrase",
    "image_rephrase",
    "text_locality",
    "image_locality",
    "near_locality",
)
"""Sequences of an optimisation step: IN, twice SE, three times OUT (arXiv 2601.19700, eq. 2-6).

`near_locality` asks the edit's own question about another picture, the closest negative.
"""

REPHRASE_SLOTS = SUPERVISION_SLOTS[1:3]
LOCALITY_SLOTS = SUPERVISION_SLOTS[3:]
NEAR = LOCALITY_SLOTS[-1]
REPHRASE = "rephrase"
"""Slot of a text and an image rephrase in one sequence, see `EditRequest.rephrase`."""

RELIABILITY = "rel"
_PROBE_NAME = re.compile(r"[a-z]+_(gen|loc)(_[a-z0-9]+){0,3}")
_LOCALITY_NAME = re.compile(r"[a-z]+_loc(ality)?(_|$)")  # details follow the kind
_WORTH_SPLITTING = 1 / 16
"""Split off the short sequences only if that saves this share of the padded positions."""
_FURTHER = re.compile(r"((?:text_|image_)?rephrase)_([2-9]|[1-9][0-9]+)")
_EDIT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Picture:
    """One image, read and checked.

    Attributes:
        key: Hash of the file's content; equal pictures are encoded once.
        pixels: RGB `uint8 (height, width, 3)` as read, or `float32 (3, height, width)` after a backbone's image
            processor.
        size: Height and width as read, if a backbone's image processor has changed the pixels.
    """

    key: str
    pixels: np.ndarray
    size: tuple[int, int] | None = None

    __repr__ = brief

    @classmethod
    def without_pixels(cls, key: str, size: tuple[int, int] | None = None) -> Picture:
        """A picture that only carries its key and size, for features that are computed already."""
        return cls(key, np.zeros((0, 0, 3), dtype=np.uint8), size)

    def without_its_pixels(self) -> Picture:
        """The same picture's key and size, for features that are computed already."""
        height, width = self.pixels.shape[:2] if self.size is None else self.size
        return Picture.without_pixels(self.key, (height, width))

    @property
    def is_processed(self) -> bool:
        return bool(self.pixels.dtype == np.float32)

    def _repr_html_(self) -> str:
        return picture_html(self, f"Picture {self.key}")


@dataclass(frozen=True)
class Probe:
    """One prompt, with or without a picture, and its answer.

    Attributes:
        prompt: Bare question, or beginning of a caption; `prompts.Template` adds the text around it.
        target: Bare answer; the model reads `" " + target`.
        picture: Picture of the prompt; None for a text-only prompt.
        is_caption: Whether `prompt` is a text to continue rather than a question.
        fact: Fact that the prompt asks about, if the record names it.
        entity: Thing that the picture shows, or a prompt without picture is about, if the record names it.
    """

    prompt: str
    target: str
    picture: Picture | None = None
    is_caption: bool = False
    fact: str | None = None
    entity: str | None = None


def things_of(fact: str | None, entity: str | None) -> frozenset[str]:
    """The named fact and the named entity as a set; unnamed ones are left out.

    >>> things_of(None, "the pink four")
    frozenset({'entity: the pink four'})
    """
    return frozenset(f"{kind}: {name}" for kind, name in (("fact", fact), ("entity", entity)) if name is not None)


@dataclass(frozen=True)
class EditRequest:
    """One fact to change, with the probes that supervise the change and those that score it.

    Attributes:
        edit_id: Name of the edit's row and file: letters, digits, `.`, `_` and `-`.
        edit: Prompt and its new answer (IN).
        supervision: Probes by slot: `SUPERVISION_SLOTS` but the first, and further rephrases (`rephrase_slots`).
            Targets of locality slots only select the positions that are compared.
        probes: Probes that are scored, by metric name: `t_gen`, `m_gen`, `t_loc`, `m_loc`, and any
            `<name>_gen[_<detail>]` or `<name>_loc[_<detail>]`. The edit itself is scored as `rel`.
        task: Kind of record, `vqa` or `caption`.
        meta: Strings copied into the result row (source file, record number, ...).
        replaced: Answer of the unedited model according to the record; None if the record has none.
    """

    edit_id: str
    edit: Probe
    supervision: Mapping[str, Probe] = field(default_factory=lambda: MappingProxyType({}))
    probes: Mapping[str, Probe] = field(default_factory=lambda: MappingProxyType({}))
    task: str = "vqa"
    meta: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    replaced: str | None = None

    def __post_init__(self) -> None:
        if not _EDIT_ID.fullmatch(self.edit_id):
            raise ValueError(
                f"edit_id: got {self.edit_id!r}, expected 1 to 128 letters, digits, '.', '_' or '-', "
                "the first a letter or digit (it names the edit's file)."
            )
        for name in self.supervision:
            if not is_supervision(name):
                raise ValueError(f"{self.edit_id}: unknown supervision slot {name!r}; allowed: {SUPERVISION_ALLOWED}.")
        for name in self.probes:
            check_probe_name(name)

    def rephrase(self, number: int = 1) -> Probe | None:
        """The prompt of a text rephrase with the picture of the image rephrase of the same number, counted from 1.

        A missing one is the edit's own; None if both are missing.
        """
        text, image = (self.supervision.get(numbered(slot, number)) for slot in REPHRASE_SLOTS)
        if image is None:
            return text
        return replace(text or self.edit, picture=image.picture)

    def reading(self, slots: Collection[str]) -> EditRequest:
        """The request with the supervision of these slots alone, those of the first rephrases for all of them."""
        kept = {slot: probe for slot, probe in self.supervision.items() if unnumbered(slot) in slots}
        return replace(self, supervision=kept)

    def kept_things(self) -> frozenset[str]:
        """Facts and entities of the scored probes whose answers must stay; supervision must not show them."""
        stay = (probe for name, probe in self.probes.items() if is_locality(name))
        return frozenset().union(*(things_of(probe.fact, probe.entity) for probe in stay))

    @property
    def num_rephrases(self) -> int:
        """Largest number of a rephrase; 0 without any."""
        return max((_number(slot) for slot in self.supervision if unnumbered(slot) in REPHRASE_SLOTS), default=0)

    def _repr_html_(self) -> str:
        return request_html(self)

    def pictures(self) -> list[Picture]:
        """All pictures of the request in a fixed order, with repeats."""
        probes = [self.edit, *self.supervision.values(), *self.probes.values()]
        return [probe.picture for probe in probes if probe.picture is not None]


def check_probe_name(name: str) -> None:
    """Raises ValueError unless `name` is a probe's name and no column of another probe can have it."""
    if name == RELIABILITY:
        raise ValueError(f"unknown probe {name!r}: {name!r} is the edit itself; give the further probe another name.")
    reserved = columns.words()
    word = next((part for part in name.split("_")[2:] if part in reserved), None)
    if word is not None:
        raise ValueError(
            f"unknown probe {name!r}: {word!r} ends the name of a column that is made from another probe. "
            "Choose another detail."
        )
    if not _PROBE_NAME.fullmatch(name):
        raise ValueError(
            f"unknown probe {name!r}: expected <name>_gen or <name>_loc, optionally with _<detail>, e.g. m_loc_near or "
            "port_gen_1hop."
        )


def numbered(slot: str, number: int) -> str:
    """Slot of the rephrase with that number, counted from 1; the first has no number in its name.

    >>> numbered("text_rephrase", 1), numbered("text_rephrase", 2)
    ('text_rephrase', 'text_rephrase_2')
    """
    return slot if number == 1 else f"{slot}_{number}"


def unnumbered(slot: str) -> str:
    """Slot of the first rephrase of the same kind; any other slot unchanged.

    >>> unnumbered("image_rephrase_3"), unnumbered("near_locality_3")
    ('image_rephrase', 'near_locality_3')
    """
    match = _FURTHER.fullmatch(slot)
    return slot if match is None else match[1]


def _number(slot: str) -> int:
    match = _FURTHER.fullmatch(slot)
    return 1 if match is None else int(match[2])


def rephrase_slots(count: int) -> tuple[str, ...]:
    """Slots of `count` text rephrases and as many image rephrases.

    >>> rephrase_slots(2)
    ('text_rephrase', 'image_rephrase', 'text_rephrase_2', 'image_rephrase_2')
    """
    return tuple(numbered(slot, number) for number in range(1, count + 1) for slot in REPHRASE_SLOTS)


def is_supervision(slot: str) -> bool:
    """Whether a request can have supervision of that name."""
    return slot in SUPERVISION_SLOTS[1:] or unnumbered(slot) in REPHRASE_SLOTS


SUPERVISION_ALLOWED = f"{', '.join(SUPERVISION_SLOTS[1:])}, and {numbered(REPHRASE_SLOTS[0], 2)} and so on"
"""Allowed names of supervision, for messages."""


def negative_slots(count: int) -> tuple[str, ...]:
    """Slots of hard negatives in a supervision batch; the sequences differ only in their picture."""
    return tuple(f"{NEAR}_{number}" for number in range(1, count + 1))


def is_negative(slot: str) -> bool:
    """Whether a slot is one of `negative_slots`."""
    return slot.startswith(f"{NEAR}_")


def is_locality(name: str) -> bool:
    """Whether the answer to a slot or probe must stay unchanged."""
    return _LOCALITY_NAME.match(name) is not None


@dataclass(frozen=True)
class Answers:
    """The M target tokens of K sequences of a batch, ordered by edit, sequence and position.

    Indices instead of masks: the size of a masked result is known only after waiting for the GPU.

    Attributes:
        slots: Names of the sequences.
        columns_K: Slot numbers in the batch.
        present_EK: Presence of the sequences, bool.
        mask_EKT: Target mask of the sequences.
        at_M: Index of each token in the batch's flattened `(E, all slots, T)`.
        among_M: Index of each token in the flattened `(E, K, T)` of these sequences.
        tokens_M: Token ids.
        column_inverse, among_inverse: Inverses of `columns_K` and `among_M`, see `odedit.runtime.gather`.
    """

    slots: tuple[str, ...]
    columns_K: Tensor
    present_EK: Tensor
    mask_EKT: Tensor
    at_M: Tensor
    among_M: Tensor
    tokens_M: Tensor
    column_inverse: Tensor
    among_inverse: Tensor

    __repr__ = brief

    def spread(self, values_M: Tensor, elsewhere: float = 0.0) -> Tensor:
        """The tokens' values as `(E, K, T)`, with `elsewhere` where there is no token."""
        return spread(values_M, self.among_M, self.among_inverse, elsewhere).reshape(self.mask_EKT.shape)

    def of(self, values_EK: Tensor) -> Tensor:
        """The columns of these sequences, `(E, K, ...)`, from `(E, all slots, ...)`."""
        return select(values_EK, 1, self.columns_K, self.column_inverse)


def by_length(lengths: Sequence[int], at_least: float = 0) -> list[list[int]]:
    """Groups slots by length: one group, or long and short ones separately if that saves enough padding.

    A sequence is padded to the longest of its group, and prompts without a picture are much shorter than others.

    Args:
        at_least: Padded positions per edit that a split must save.

    >>> by_length([56, 24, 50])
    [[0, 2], [1]]
    """
    columns, ascending = list(range(len(lengths))), sorted(lengths)
    saved = [count * (ascending[-1] - ascending[count - 1]) for count in columns]
    if not columns or max(saved) < max(_WORTH_SPLITTING * len(columns) * ascending[-1], at_least):
        return [columns]
    longest_short = ascending[saved.index(max(saved)) - 1]
    groups = [[k for k in columns if (lengths[k] <= longest_short) == is_short] for is_short in (False, True)]
    return [group for group in groups if group]


@dataclass(frozen=True)
class EditBatch:
    """E edits x K sequences, right-padded; made by `Backbone.encode`.

    Attributes:
        edit_ids: Names of the E edits.
        slots: Names of the K sequences: those of the supervision for optimisation, metric names for evaluation.
        tokens_EKS: Token ids; image positions hold the image token.
        present_EK: False where an edit lacks the sequence (its tokens are padding).
        real_EKS: True at positions that are not padding.
        prompt_EKS: True at positions before the target, image positions included.
        predict_EKT: Positions whose next token is the t-th target token.
        target_EKT: Token ids of the target.
        target_mask_EKT: False after a target's end and in absent sequences.
        features_NLD: Image features of the batch's distinct pictures, `(pictures, query tokens, hidden)`; if
            `before_connector`, outputs of the image tower, `(pictures, patches, width)`.
        picture_EK: Row of `features_NLD`; -1 for a sequence without picture.
        image_EKS: True at positions that take image features.
        white_EK: Number of leading target tokens that are only white space, such as LLaMA's before a digit. They are
            trained and generated, but not scored.
        before_connector: Whether features are inputs of the connector, because an editor changes it.
        room: Positions after the longest sequence that a generated answer may take, see `with_room`.
        sizes: Height and width of the pictures of `features_NLD`, for models that treat them differently; else empty.
        pictures: Keys of the pictures of `features_NLD`.
        lengths: Length of each slot's longest sequence, known without waiting for a GPU; an upper bound after edits
            were removed. Empty if unknown.
    """

    edit_ids: tuple[str, ...]
    slots: tuple[str, ...]
    tokens_EKS: Tensor
    present_EK: Tensor
    real_EKS: Tensor
    prompt_EKS: Tensor
    predict_EKT: Tensor
    target_EKT: Tensor
    target_mask_EKT: Tensor
    features_NLD: Tensor
    picture_EK: Tensor
    image_EKS: Tensor
    white_EK: Tensor
    before_connector: bool = False
    room: int = 0
    lengths: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    pictures: tuple[str, ...] = ()
    _answers: dict[tuple[str, ...], Answers] = field(default_factory=dict, init=False, repr=False, compare=False)
    _state_indices: dict[tuple[tuple[str, ...], ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    __repr__ = brief

    @property
    def num_edits(self) -> int:
        return len(self.edit_ids)

    def answers(self, slots: tuple[str, ...]) -> Answers:
        """Target tokens of these sequences; cached."""
        if slots not in self._answers:
            columns_K = torch.tensor([self.slots.index(slot) for slot in slots], device=self.tokens_EKS.device).long()
            mask_EKT = self.target_mask_EKT.index_select(1, columns_K)
            among_M = mask_EKT.flatten().nonzero().squeeze(1)
            index_EKT = torch.arange(self.target_mask_EKT.numel(), device=columns_K.device)
            index_EKT = index_EKT.reshape(self.target_mask_EKT.shape).index_select(1, columns_K)
            at_M = index_EKT.flatten()[among_M]
            present_EK, tokens_M = self.present_EK.index_select(1, columns_K), self.target_EKT.flatten()[at_M]
            inverses = inverse_index(columns_K, len(self.slots)), inverse_index(among_M, mask_EKT.numel())
            self._answers[slots] = Answers(slots, columns_K, present_EK, mask_EKT, at_M, among_M, tokens_M, *inverses)
        return self._answers[slots]

    def states_at(self, states_EKTD: Tensor, *answers: Answers) -> Tensor:
        """States that predict the tokens of several disjoint `answers`, concatenated, `(M, D)`."""
        groups = tuple(part.slots for part in answers)
        if groups not in self._state_indices:
            at_M = torch.cat([part.at_M for part in answers])
            self._state_indices[groups] = at_M, inverse_index(at_M, self.target_mask_EKT.numel())
        return select(states_EKTD.flatten(0, 2), 0, *self._state_indices[groups])

    @cached_property
    def counted_EKT(self) -> Tensor:
        """True at target tokens that are scored: those from the first that is not white space."""
        index_T = torch.arange(self.target_EKT.shape[-1], device=self.target_EKT.device)
        return self.target_mask_EKT & (index_T >= self.white_EK.unsqueeze(-1))

    def with_room(self, size: int, token: int, max_positions: int) -> EditBatch:
        """A copy with `size` more target tokens per probe, for generated answers that are longer than the target.

        The added tokens take the next positions, possibly beyond the longest sequence. Only `Backbone.target_states`
        reads them.

        Args:
            token: Token id of the added target tokens.
            max_positions: Positions of the text model; tokens beyond them are masked out.
        """
        index_N = torch.arange(self.target_EKT.shape[-1] + size, device=self.target_EKT.device)
        count_EK1 = self.target_mask_EKT.sum(dim=-1, keepdim=True)
        predict_EKN = self.predict_EKT[..., :1] + index_N
        mask_EKN = (index_N < count_EK1 + size) & (predict_EKN < max_positions) & self.present_EK.unsqueeze(-1)
        target_EKN = torch.nn.functional.pad(self.target_EKT, (0, size)).where(index_N < count_EK1, token)
        return replace(
            self,
            predict_EKT=predict_EKN.where(mask_EKN, 0),
            target_EKT=target_EKN.where(mask_EKN, 0),
            target_mask_EKT=mask_EKN,
            room=size,
        )

    def select(self, slots: Sequence[str]) -> EditBatch:
        """The batch with only the named slots, in this order."""
        index = torch.tensor([self.slots.index(slot) for slot in slots], device=self.tokens_EKS.device)
        columns = {name: getattr(self, name).index_select(1, index) for name in _PER_SEQUENCE}
        lengths = tuple(self.lengths[self.slots.index(slot)] for slot in slots) if self.lengths else ()
        return replace(self, slots=tuple(slots), lengths=lengths, **columns)

    def parts(self) -> list[EditBatch]:
        """The sequences as one or two batches of similar lengths, each without needless padding, see `by_length`."""
        groups = by_length(self.lengths, budgets(self.tokens_EKS.device).spared_positions / max(1, self.num_edits))
        if len(groups) < 2:
            return [self]
        return [self.select([self.slots[k] for k in columns])._cut() for columns in groups]

    def _cut(self) -> EditBatch:
        return replace(self, **{name: getattr(self, name)[..., : max(self.lengths)] for name in _PER_POSITION})

    def pick(self, slots: Sequence[str], columns_EK: Tensor) -> EditBatch:
        """Sequences chosen for every edit by slot number, under new slot names."""
        rows_E1 = torch.arange(self.num_edits, device=columns_EK.device).unsqueeze(1)
        columns = {name: getattr(self, name)[rows_E1, columns_EK] for name in _PER_SEQUENCE}
        return replace(self, slots=tuple(slots), lengths=(), **columns)

    def take(self, edits: Tensor) -> EditBatch:
        """The edits with these row numbers, with all their sequences."""
        columns = {name: getattr(self, name).index_select(0, edits) for name in _PER_SEQUENCE}
        return replace(self, edit_ids=tuple(self.edit_ids[row] for row in edits.tolist()), **columns)


_PER_POSITION = ("tokens_EKS", "real_EKS", "prompt_EKS", "image_EKS")
_PER_SEQUENCE = (
    *_PER_POSITION, "present_EK", "predict_EKT", "target_EKT", "target_mask_EKT", "picture_EK", "white_EK",
)  # fmt: skip


def stack_params(params: Sequence[EditParams]) -> EditParams:
    """Parameters of several edits, concatenated along axis 0; a shorter axis 1 is padded with zeros."""
    return {name: torch.cat(_padded([edit[name] for edit in params])) for name in params[0]}


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    if tensors[0].dim() < 2:
        return list(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return [
        torch.cat([tensor, tensor.new_zeros(tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:])], dim=1)
        if tensor.shape[1] < longest
        else tensor
        for tensor in tensors
    ]
