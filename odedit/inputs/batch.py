"""What is edited: pictures, probes, requests, and the batch that the model sees.

Shape legend, used as a suffix of tensor names everywhere:

    E  edits in a batch            K  sequences of one edit (`EditBatch.slots`)
    S  positions of a sequence     T  target tokens of a sequence
    D  hidden size                 V  vocabulary
    L  positions of an image       Q  kernel bandwidths        P  sketch size

One edit owns a fixed number K of sequences, the absent ones masked, so that a hook can view a
module's input as `(E, K, S, D)` and compute with one set of edited parameters per edit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from odedit.runtime.brief import brief
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import places_of, select, spread

EditParams = dict[str, Tensor]
"""phi_e. Axis 0 of every tensor is the edit; this is what safetensors stores."""

EDIT = "edit"
SUPERVISION_SLOTS = (
    EDIT,
    "text_rephrase",
    "image_rephrase",
    "text_locality",
    "image_locality",
    "near_locality",
)
"""The sequences an optimisation step sees: IN, twice SE, three times OUT (arXiv 2601.19700, eq. 2-6).

`near_locality` asks the edit's own question about another picture: the negative that shares the
most with the edit.
"""

REPHRASE_SLOTS = SUPERVISION_SLOTS[1:3]
LOCALITY_SLOTS = SUPERVISION_SLOTS[3:]
NEAR = LOCALITY_SLOTS[-1]
REPHRASE = "rephrase"
"""Both rephrases in one sequence, see `EditRequest.rephrase`."""

RELIABILITY = "rel"
LOCALITY_PROBES = ("t_loc", "m_loc")
_PROBE_NAME = re.compile(r"[a-z]+_(gen|loc)(_[a-z]+)?")
_LOCALITY_NAME = re.compile(r"[a-z]+_loc(ality)?(_|$)")  # the kind is the second word; details come after it
_WORTH_SPLITTING = 1 / 16
"""Share of a batch's positions for which its short sequences run apart: a second start of every kernel costs, too."""
_EDIT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Variant(StrEnum):
    """What may follow a probe's name in columns and logged figures; no probe's detail may be called like one.

    `column` refuses a variant that is not declared here.
    """

    EXACT = "exact"
    BEFORE = "before"
    GENERATED = "generated"
    WHOLE = "whole"
    MMEDIT = "mmedit"
    FAR = "far"
    TOP10 = "top10"
    LOW = "low"
    HIGH = "high"


def column(probe: str, *variants: Variant) -> str:
    """The name of a figure of a probe.

    Raises:
        ValueError: A variant is not declared.

    >>> column("m_gen", Variant.EXACT, Variant.BEFORE)
    'm_gen_exact_before'
    """
    return "_".join((probe, *(Variant(variant) for variant in variants)))


@dataclass(frozen=True)
class Picture:
    """One image, read and checked.

    Attributes:
        key: Hash of the file's content; equal pictures are encoded once.
        pixels: `uint8 (height, width, 3)` RGB as read, or `float32 (3, height, width)` as a
            backbone's image processor left it.
    """

    key: str
    pixels: np.ndarray

    __repr__ = brief

    @classmethod
    def without_pixels(cls, key: str) -> Picture:
        """Of a picture whose features are at hand, which its key finds."""
        return cls(key, np.zeros((0, 0, 3), dtype=np.uint8))

    @property
    def is_processed(self) -> bool:
        return bool(self.pixels.dtype == np.float32)


@dataclass(frozen=True)
class Probe:
    """One prompt, with or without a picture, and the answer whose tokens are read.

    Attributes:
        prompt: The bare question, or the beginning of a caption; `prompts.Template` dresses it.
        target: The bare answer; the model sees `" " + target`.
        picture: None for a text-only prompt.
        is_caption: Whether `prompt` is to be continued as it stands rather than asked as a question.
    """

    prompt: str
    target: str
    picture: Picture | None = None
    is_caption: bool = False


@dataclass(frozen=True)
class EditRequest:
    """One fact to change, what may supervise the change, and what judges it.

    Attributes:
        edit_id: Names the edit's row and file: letters, digits, `.`, `_` and `-`.
        edit: The prompt and its new answer (IN).
        supervision: Slot name (`SUPERVISION_SLOTS` but the first) to probe. Targets of locality slots
            only say which positions are compared.
        probes: Metric name to probe, what the scores are computed on: `t_gen`, `m_gen`, `t_loc`,
            `m_loc`, and any further `<name>_gen[_<detail>]` or `<name>_loc[_<detail>]`.
            The edit itself is scored as `rel`.
        task: `vqa` or `caption`, what kind of record it came from.
        meta: Strings carried into the result row as they are (source file, record number, ...).
        replaced: What the unedited model is said to answer, if anything is said.
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
            if name not in SUPERVISION_SLOTS[1:]:
                raise ValueError(
                    f"{self.edit_id}: unknown supervision slot {name!r}; allowed: {', '.join(SUPERVISION_SLOTS[1:])}."
                )
        for name in self.probes:
            check_probe_name(name)

    def rephrase(self) -> Probe | None:
        """The text rephrase's prompt about the image rephrase's picture; where one is missing, the edit's own."""
        text, image = (self.supervision.get(slot) for slot in REPHRASE_SLOTS)
        if image is None:
            return text
        return replace(text or self.edit, picture=image.picture)

    def pictures(self) -> list[Picture]:
        """Every picture of the request, in a fixed order, repeats included."""
        probes = [self.edit, *self.supervision.values(), *self.probes.values()]
        return [probe.picture for probe in probes if probe.picture is not None]


def check_probe_name(name: str) -> None:
    """Raises ValueError unless `name` says what the probe measures, and no other probe's figures go by that name."""
    if name == RELIABILITY:
        raise ValueError(f"unknown probe {name!r}: {name!r} is the edit itself; give the further probe another name.")
    taken = next((word for word in name.split("_")[2:] if word in set(Variant)), None)
    if taken is not None:
        raise ValueError(
            f"unknown probe {name!r}: {taken!r} ends the name of a column that is made from another probe. "
            "Choose another detail."
        )
    if not _PROBE_NAME.fullmatch(name):
        raise ValueError(
            f"unknown probe {name!r}: expected <name>_gen or <name>_loc, optionally with _<detail>, e.g. m_loc_near."
        )


def negative_slots(count: int) -> tuple[str, ...]:
    """What hard negatives are called in a supervision batch: sequences that differ in their picture alone."""
    return tuple(f"{NEAR}_{number}" for number in range(1, count + 1))


def is_negative(slot: str) -> bool:
    """Whether a slot is one of `negative_slots`."""
    return slot.startswith(f"{NEAR}_")


def is_locality(name: str) -> bool:
    """Whether a slot or a probe must stay as it was."""
    return _LOCALITY_NAME.match(name) is not None


@dataclass(frozen=True)
class Answers:
    """The target tokens of K sequences of a batch, M of them in the order of edits, sequences and positions.

    A mask as index would ask a GPU in every step how many there are, which waits for all that it was given before.

    Attributes:
        slots, columns_K: Which sequences of the batch.
        present_EK, mask_EKT: Of these sequences, as in the batch.
        at_M: Where the tokens are in the batch's `(E, K, T)`, all sequences and flattened.
        among_M: Where they are among these sequences.
        tokens_M: Token ids.
        column_places, among_places: The inverse of `columns_K` and of `among_M`, see `odedit.runtime.gather.places_of`.
    """

    slots: tuple[str, ...]
    columns_K: Tensor
    present_EK: Tensor
    mask_EKT: Tensor
    at_M: Tensor
    among_M: Tensor
    tokens_M: Tensor
    column_places: Tensor
    among_places: Tensor

    __repr__ = brief

    def spread(self, values_M: Tensor, elsewhere: float = 0.0) -> Tensor:
        """The tokens' values where they belong, `(E, K, T)`."""
        return spread(values_M, self.among_M, self.among_places, elsewhere).reshape(self.mask_EKT.shape)

    def of(self, values_EK: Tensor) -> Tensor:
        """What `(E, all sequences, ...)` has of these sequences."""
        return select(values_EK, 1, self.columns_K, self.column_places)


def by_length(lengths: Sequence[int], at_least: float = 0) -> list[list[int]]:
    """Columns that had better run together, ascending: all, or the short ones apart from the long ones.

    A sequence is padded to the longest that it runs with, and a prompt without picture is much shorter than one with.

    Args:
        at_least: Positions of an edit that must be spared, or all run together.

    >>> by_length([56, 24, 50])
    [[0, 2], [1]]
    """
    columns, in_order = list(range(len(lengths))), sorted(lengths)
    spared = [count * (in_order[-1] - in_order[count - 1]) for count in columns]
    if not columns or max(spared) < max(_WORTH_SPLITTING * len(columns) * in_order[-1], at_least):
        return [columns]
    short = in_order[spared.index(max(spared)) - 1]
    parts = [[k for k in columns if (lengths[k] <= short) == is_short] for is_short in (False, True)]
    return [part for part in parts if part]


@dataclass(frozen=True)
class EditBatch:
    """E edits x K sequences, right-padded; what `Backbone.encode` returns.

    Attributes:
        edit_ids: E names.
        slots: K names; `SUPERVISION_SLOTS` for optimisation, metric names for evaluation.
        tokens_EKS: Token ids; positions of image features hold the image token.
        present_EK: False where an edit has no such sequence (its tokens are padding).
        real_EKS: True at every position that is not padding.
        prompt_EKS: True at positions before the target, image positions included.
        predict_EKT: The positions *whose next token* is the t-th target token.
        target_EKT: The target's token ids.
        target_mask_EKT: False beyond a target's end and everywhere in an absent sequence.
        features_NLD: Image features of the batch's distinct pictures, `(pictures, query tokens, hidden)`; where
            `before_connector`, what the image tower made of them, `(pictures, patches, width)`.
        picture_EK: Row of `features_NLD`, or -1 for a sequence without picture.
        image_EKS: True at positions that take image features.
        white_EK: How many of the target's first tokens are white space and nothing else, as LLaMA's tokenizer makes one
            in front of a digit. They are trained and generated as the rest is, but no score counts them.
        before_connector: Whether the connector to the text model has yet to run, because an editor changes it.
        room: Positions behind the longest sequence that a generated answer may run on to, see `with_room`.
        lengths: Of each slot's longest sequence, known without waiting for a GPU; may be more than it is where edits
            have been left out. Empty if not known.
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
    _answers: dict[tuple[str, ...], Answers] = field(default_factory=dict, init=False, repr=False, compare=False)
    _places: dict[tuple[tuple[str, ...], ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    __repr__ = brief

    @property
    def num_edits(self) -> int:
        return len(self.edit_ids)

    def answers(self, slots: tuple[str, ...]) -> Answers:
        """Where the target tokens of these sequences are; found once."""
        if slots not in self._answers:
            columns_K = torch.tensor([self.slots.index(slot) for slot in slots], device=self.tokens_EKS.device).long()
            mask_EKT = self.target_mask_EKT.index_select(1, columns_K)
            among_M = mask_EKT.flatten().nonzero().squeeze(1)
            numbers_EKT = torch.arange(self.target_mask_EKT.numel(), device=columns_K.device)
            numbers_EKT = numbers_EKT.reshape(self.target_mask_EKT.shape).index_select(1, columns_K)
            at_M = numbers_EKT.flatten()[among_M]
            present_EK, tokens_M = self.present_EK.index_select(1, columns_K), self.target_EKT.flatten()[at_M]
            places = places_of(columns_K, len(self.slots)), places_of(among_M, mask_EKT.numel())
            self._answers[slots] = Answers(slots, columns_K, present_EK, mask_EKT, at_M, among_M, tokens_M, *places)
        return self._answers[slots]

    def states_at(self, states_EKTD: Tensor, *answers: Answers) -> Tensor:
        """States that predict the tokens of all of them, one after the other, `(M, D)`. No sequence may be in two."""
        groups = tuple(one.slots for one in answers)
        if groups not in self._places:
            at_M = torch.cat([one.at_M for one in answers])
            self._places[groups] = at_M, places_of(at_M, self.target_mask_EKT.numel())
        return select(states_EKTD.flatten(0, 2), 0, *self._places[groups])

    @cached_property
    def counted_EKT(self) -> Tensor:
        """The target tokens that scores count: from the first that is not white space."""
        places_T = torch.arange(self.target_EKT.shape[-1], device=self.target_EKT.device)
        return self.target_mask_EKT & (places_T >= self.white_EK.unsqueeze(-1))

    def with_room(self, size: int, token: int, max_positions: int) -> EditBatch:
        """A copy with `size` more target places per probe, for generated answers that are longer than the target.

        Args:
            size: Places to add.
            token: Token at each of them.
            max_positions: Positions of the text model; places beyond them are masked out.
        """
        places_N = torch.arange(self.target_EKT.shape[-1] + size, device=self.target_EKT.device)
        count_EK1 = self.target_mask_EKT.sum(dim=-1, keepdim=True)
        predict_EKN = self.predict_EKT[..., :1] + places_N
        is_there = (places_N < count_EK1 + size) & (predict_EKN < max_positions) & self.present_EK.unsqueeze(-1)
        target_EKN = torch.nn.functional.pad(self.target_EKT, (0, size)).where(places_N < count_EK1, token)
        return replace(
            self,
            predict_EKT=predict_EKN.where(is_there, 0),
            target_EKT=target_EKN.where(is_there, 0),
            target_mask_EKT=is_there,
            room=size,
        )

    def select(self, slots: Sequence[str]) -> EditBatch:
        """The same edits with only the named slots, in that order."""
        index = torch.tensor([self.slots.index(slot) for slot in slots], device=self.tokens_EKS.device)
        columns = {name: getattr(self, name).index_select(1, index) for name in _PER_SEQUENCE}
        lengths = tuple(self.lengths[self.slots.index(slot)] for slot in slots) if self.lengths else ()
        return replace(self, slots=tuple(slots), lengths=lengths, **columns)

    def parts(self) -> list[EditBatch]:
        """The same sequences, those that had better run together in a batch each, no longer than they need to be."""
        groups = by_length(self.lengths, budgets(self.tokens_EKS.device).spared_positions / max(1, self.num_edits))
        if len(groups) < 2:
            return [self]
        return [self.select([self.slots[k] for k in columns])._cut() for columns in groups]

    def _cut(self) -> EditBatch:
        return replace(self, **{name: getattr(self, name)[..., : max(self.lengths)] for name in _PER_POSITION})

    def pick(self, slots: Sequence[str], columns_EK: Tensor) -> EditBatch:
        """Of every edit the sequences with these numbers, to go by these names."""
        rows_E1 = torch.arange(self.num_edits, device=columns_EK.device).unsqueeze(1)
        columns = {name: getattr(self, name)[rows_E1, columns_EK] for name in _PER_SEQUENCE}
        return replace(self, slots=tuple(slots), lengths=(), **columns)

    def take(self, edits: Tensor) -> EditBatch:
        """The edits with these rows, with all their sequences."""
        columns = {name: getattr(self, name).index_select(0, edits) for name in _PER_SEQUENCE}
        return replace(self, edit_ids=tuple(self.edit_ids[row] for row in edits.tolist()), **columns)


_PER_POSITION = ("tokens_EKS", "real_EKS", "prompt_EKS", "image_EKS")
_PER_SEQUENCE = (
    *_PER_POSITION, "present_EK", "predict_EKT", "target_EKT", "target_mask_EKT", "picture_EK", "white_EK",
)  # fmt: skip


def stack_params(params: Sequence[EditParams]) -> EditParams:
    """Parameters of several finished edits, axis 0 the edit. Where axis 1 differs, the shorter get zeros."""
    return {name: torch.cat(_padded([one[name] for one in params])) for name in params[0]}


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
