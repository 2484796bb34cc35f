"""What joint training reads: the records' questions about changing pictures, and the answers that must stay.

What shows the same thing as a record's picture is decided by the unedited model alone: a picture of the pool about
which it answers the record's question as it answers it about the record's own picture.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from odedit.backbones import is_connector
from odedit.backbones.base import Backbone, ends_of
from odedit.backbones.common.same_things import TOO_COMMON
from odedit.data.rewording import base_key
from odedit.data.variation import altered, variations
from odedit.errors import InputError
from odedit.inputs.batch import REPHRASE_SLOTS, EditRequest, Picture, Probe, numbered, unnumbered
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.prompts import Template
from odedit.runtime import parallel
from odedit.runtime.brief import brief
from odedit.ways.common.sequences import Features, about, own_answers, usual_end, with_answer

Tokens = tuple[int, ...]
_Key = tuple[Tokens, int, str | None]
_KNOWN_BYTES = 2**30
"""Memory of a worker for states of the unedited model."""

NEARNESS = 0.1
"""Temperature of the cosine with which near pictures are drawn as negatives."""
_JOINED_WITH = 40
"""Pool pictures, the last ones read, with which an altered copy may be joined."""
_ENDS_ASKED = 16
"""Records whose answers show, without a pool, how the model ends an answer."""
_OTHER_PICTURE = REPHRASE_SLOTS[1]
_ALTERED = "altered"


@dataclass(frozen=True)
class Example:
    """What one record trains.

    Attributes:
        edit_id: Name of the record.
        wordings: Its question and its rephrases, each with the new answer and the answer's end.
        own: Keys of its picture and of varied copies; empty for a question without picture.
        other: Keys of the rephrases' pictures and of varied copies, as many copies as of its own; all pictures come
            first.
        same: Keys of pool pictures of the same thing.
        supervision: Sequences of its other slots of supervision.
        negatives: Its question about pictures of other things, and without a picture, with the unedited answers.
        nearness: Weight with which each negative is drawn, [negatives].
    """

    edit_id: str
    wordings: tuple[TokenSequence, ...]
    own: tuple[str, ...]
    other: tuple[str, ...]
    same: tuple[str, ...] = ()
    supervision: Mapping[str, TokenSequence] = field(default_factory=dict)
    negatives: tuple[TokenSequence, ...] = ()
    nearness: tuple[float, ...] = ()

    __repr__ = brief


@dataclass(frozen=True)
class Examples:
    """Everything that joint training reads.

    Attributes:
        records: One example per record that the model takes.
        restored: One example per removed record, whose answers are those of the unedited model.
        kept: Questions of the pool with the unedited model's answers.
        features: Features of all pictures.
        unedited: What is known of the unedited model at these answers.
        problems: Reason per record that the model does not take, by edit id.
    """

    records: Sequence[Example]
    restored: Sequence[Example]
    kept: Sequence[TokenSequence]
    features: Features
    unedited: KnownStates
    problems: Mapping[str, str]

    __repr__ = brief


@dataclass(frozen=True)
class Reading:
    """How examples are made.

    Attributes:
        copies: Varied copies of each of a record's pictures.
        pool_copies: Altered copies of each of the pool's pictures.
        candidates: Nearest pool pictures about which a record's question is asked.
        seed: Seed of the copies.
    """

    copies: int
    candidates: int
    seed: int
    pool_copies: int = 0


def read(
    backbone: Backbone,
    template: Template,
    sites: Sequence[str],
    requests: Sequence[EditRequest],
    pool: Sequence[EditRequest],
    reading: Reading,
    removed: Sequence[EditRequest] = (),
) -> Iterator[tuple[str, int, int] | Examples]:
    """Makes the examples: yields what is done, how many of how many, and at last the `Examples`."""
    features = Features(backbone, any(is_connector(site) for site in sites))
    maker = Maker(backbone, template, features, reading, KnownStates())
    pool_keys: list[str] = []
    kept: list[TokenSequence] = []
    for progress in read_pool(maker, pool):
        if isinstance(progress, ReadPool):
            pool_keys, kept = progress
        else:
            yield progress
    end = maker.end(kept, requests)
    drafts: list[Example] = []
    problems: dict[str, str] = {}
    for number, request in enumerate(requests):
        yield "pictures of the records", number, len(requests)
        try:
            drafts.append(maker.draft(request, end))
        except (InputError, ValueError) as error:
            problems[request.edit_id] = str(error)
    replaced = maker.replaced(drafts)
    everywhere = {answer for answers in parallel.gathered(list(replaced.values())) for answer in answers}
    records = []
    edited = frozenset(pair for pairs in parallel.gathered(replaced_at(drafts, replaced)) for pair in pairs)
    near = Near(features, pool_keys, edited)
    for number, draft in enumerate(drafts):
        yield "negatives of the records", number, len(drafts)
        records.append(maker.with_negatives(draft, replaced[draft.edit_id], everywhere, near))
    restored = [maker.restored(request, end, everywhere, near) for request in removed]
    yield Examples(records, restored, still_kept(kept, everywhere), features, maker.unedited, problems)


class ReadPool(NamedTuple):
    """The pool: keys of its pictures and of their copies, and its questions with the unedited answers."""

    keys: list[str]
    asked: list[TokenSequence]


def read_pool(maker: Maker, pool: Sequence[EditRequest]) -> Iterator[tuple[str, int, int] | ReadPool]:
    """Reads the pool: yields what is done, how many of how many, and at last the `ReadPool`."""
    keys: dict[str, None] = {}
    asked: list[TokenSequence] = []
    for number, request in enumerate(pool):
        yield "pictures of the pool", number, len(pool)
        sequences = maker.all_sequences(request)
        pictures = {picture.key: picture for picture in _own_pictures(request)}
        copies = {key: maker.altered(picture) for key, picture in pictures.items()}
        asked += sequences + _about_copies(sequences, copies)
        keys |= dict.fromkeys([*pictures, *chain.from_iterable(copies.values())])
    yield "answers of the pool", 0, len(asked)
    yield ReadPool(list(keys), maker.answered(asked))


def still_kept(asked: Sequence[TokenSequence], everywhere: Collection[Tokens]) -> list[TokenSequence]:
    """The pool's questions whose answers stay: a pictured one whose unedited answer a record replaces may ask about an
    edited fact.
    """
    return [sequence for sequence in asked if sequence.picture is None or answer_in(sequence) not in everywhere]


def answer_in(sequence: TokenSequence) -> Tokens:
    return tuple(sequence.tokens[sequence.first_target :])


def _own_pictures(request: EditRequest) -> list[Picture]:
    """The pictures of a request's edit and of its rephrase."""
    probes = (request.edit, request.supervision.get(_OTHER_PICTURE))
    return [probe.picture for probe in probes if probe is not None and probe.picture is not None]


def _rephrases(request: EditRequest, slot: str) -> list[Probe]:
    """A request's rephrases of one kind, by number."""
    slots = [numbered(slot, number) for number in range(1, request.num_rephrases + 1)]
    return [request.supervision[name] for name in slots if name in request.supervision]


def _share(total: int, parts: int, number: int) -> int:
    """Size of a part of `total` that is divided evenly; the first ones have the remainder."""
    return total // parts + (number < total % parts)


def _about_copies(sequences: Sequence[TokenSequence], copies: Mapping[str, Sequence[str]]) -> list[TokenSequence]:
    """Every question about a picture with copies, asked about one of them, each in its turn."""
    turn = Counter[str]()
    asked = []
    for sequence in sequences:
        if sequence.picture is not None and copies.get(sequence.picture):
            keys = copies[sequence.picture]
            asked.append(about(sequence, keys[turn[sequence.picture] % len(keys)]))
            turn[sequence.picture] += 1
    return asked


class KnownStates:
    """Final states of the unedited model that predict the answers of sequences, up to a GiB, in main memory.

    Half precision rounds a sequence otherwise in every batch, so that only float32 states are kept.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Keeps at most `limit` bytes; None: a GiB."""
        self._states: dict[_Key, Tensor] = {}
        self._bytes, self._limit = 0, _KNOWN_BYTES if limit is None else limit

    __repr__ = brief

    def add(self, sequence: TokenSequence, states_TD: Tensor) -> None:
        """Keeps the states at a sequence's answer, if there is room."""
        size = states_TD.numel() * states_TD.element_size()
        if states_TD.dtype == torch.float32 and self._bytes + size <= self._limit:
            self._states[_key(sequence)] = states_TD
            self._bytes += size

    def at(self, sequences: Sequence[TokenSequence | None], num_targets: int) -> Tensor | None:
        """States `(sequences, T, D)`, zeros after an answer and for None; None if one of the sequences is not known."""
        found = [None if sequence is None else self._states.get(_key(sequence)) for sequence in sequences]
        known = [states_TD for states_TD in found if states_TD is not None]
        if not known or len(known) < sum(sequence is not None for sequence in sequences):
            return None
        together = known[0].new_zeros(len(sequences), num_targets, known[0].shape[-1])
        for row, states_TD in enumerate(found):
            if states_TD is not None:
                together[row, : len(states_TD)] = states_TD
        return together


def _key(sequence: TokenSequence) -> _Key:
    return tuple(sequence.tokens), sequence.first_target, sequence.picture


class Maker:
    """Turns requests into examples."""

    def __init__(
        self, backbone: Backbone, template: Template, features: Features, reading: Reading, unedited: KnownStates
    ) -> None:
        self._backbone, self._template, self._features, self._reading = backbone, template, features, reading
        self._answers: dict[tuple[Tokens, str | None], Tokens] = {}
        self._recent: deque[Picture] = deque(maxlen=_JOINED_WITH)
        self.unedited = unedited

    def altered(self, picture: Picture) -> list[str]:
        """Keys of the altered copies of a pool picture, some of them joined with pool pictures read before it."""
        copies = altered(picture, self._recent, self._reading.pool_copies, _ALTERED, self._seed)
        self._recent.append(picture)
        self._features.add(copies)
        return [copy.key for copy in copies]

    def sequence(self, probe: Probe) -> TokenSequence:
        """Tokens of a probe. Raises InputError if the text model takes fewer."""
        sequence = self._backbone.sequence(probe, self._template)
        if len(sequence.tokens) >= self._backbone.max_positions:
            raise InputError(
                f"the question {probe.prompt[:60]!r} and its answer have {len(sequence.tokens):,} tokens; the text "
                f"model takes fewer than {self._backbone.max_positions:,}."
            )
        return sequence

    def all_sequences(self, request: EditRequest) -> list[TokenSequence]:
        """Every question of a pool's request that the model takes."""
        probes = [request.edit, *request.supervision.values(), *request.probes.values()]
        self._features.add(probe.picture for probe in probes if probe.picture is not None)
        sequences = []
        for probe in probes:
            try:
                sequences.append(self.sequence(probe))
            except (InputError, ValueError):
                continue  # a question of the pool is no record: another takes its place
        return sequences

    def answered(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """The distinct sequences with the unedited model's answers; each question is asked once."""
        asked: dict[tuple[Tokens, str | None], TokenSequence] = {}
        for sequence in sequences:
            asked.setdefault((tuple(sequence.tokens[: sequence.first_target]), sequence.picture), sequence)
        new = {key: sequence for key, sequence in asked.items() if key not in self._answers}
        answers = own_answers(self._features, list(new.values()))
        for (key, sequence), answer in zip(new.items(), answers, strict=True):
            self._answers[key] = tuple(answer.tokens)
            self.unedited.add(with_answer(sequence, answer.tokens), answer.states_TD)
        return [with_answer(sequence, self._answers[key]) for key, sequence in asked.items() if self._answers[key]]

    def end(self, kept: Sequence[TokenSequence], requests: Sequence[EditRequest]) -> int | None:
        """The token with which the unedited model ends its answers to the pool; without a pool, to some records."""
        if not kept:
            kept = self.answered([seq for request in requests[:_ENDS_ASKED] for seq in self.all_sequences(request)])
        return usual_end([answer_in(sequence) for sequence in kept], ends_of(self._backbone))

    def known_answers(self) -> dict[tuple[Tokens, str | None], Tokens]:
        """The unedited answers that are known, by question and picture."""
        return dict(self._answers)

    def forget_all_but(self, answers: Mapping[tuple[Tokens, str | None], Tokens]) -> None:
        """Keeps only these unedited answers."""
        self._answers = dict(answers)

    def draft(self, request: EditRequest, end: int | None, *, copies: bool = True) -> Example:
        """The record's questions and pictures, without negatives.

        Args:
            copies: Whether to make varied copies of the pictures.
        """
        count = self._reading.copies if copies else 0
        texts, others = (_rephrases(request, slot) for slot in REPHRASE_SLOTS)
        ending = () if end is None else (end,)
        wordings = [self.sequence(probe) for probe in (request.edit, *texts)]
        keys: dict[str, tuple[str, ...]] = {}
        for name, probes in {"own": [request.edit], "other": others}.items():
            pictures = [probe.picture for probe in probes if probe.picture is not None]
            varied = [
                copy
                for number, picture in enumerate(pictures)
                for copy in variations(
                    picture, _share(count, len(pictures), number), numbered(name, number + 1), self._seed
                )
            ]
            self._features.add([*pictures, *varied])
            keys[name] = tuple(picture.key for picture in [*pictures, *varied])
        rest = {slot: probe for slot, probe in request.supervision.items() if unnumbered(slot) not in REPHRASE_SLOTS}
        self._features.add(probe.picture for probe in rest.values() if probe.picture is not None)
        blind = self.sequence(replace(request.edit, picture=None)) if request.edit.picture is not None else None
        return Example(
            request.edit_id,
            tuple(with_answer(sequence, (*answer_in(sequence), *ending)) for sequence in wordings),
            keys["own"],
            keys["other"] or keys["own"],
            supervision={slot: self.sequence(probe) for slot, probe in rest.items()},
            negatives=() if blind is None else (blind,),
        )

    def restored(self, request: EditRequest, end: int | None, everywhere: Collection[Tokens], near: Near) -> Example:
        """The example of a removed record: its questions about its pictures, with the unedited answers."""
        draft = self.draft(request, end)
        first, *rephrases = draft.wordings
        other = next(iter(draft.other), None)
        asked = [about(first, next(iter(draft.own), None)), *(about(sequence, other) for sequence in rephrases)]
        return self.with_negatives(replace(draft, wordings=tuple(self.answered(asked))), (), everywhere, near)

    @property
    def _seed(self) -> int:
        return self._reading.seed

    def replaced(self, drafts: Sequence[Example]) -> dict[str, Tokens]:
        """The unedited model's answer to each record's question, by edit id."""
        self.answered([draft.wordings[0] for draft in drafts])
        return {draft.edit_id: self._answers[_question(draft.wordings[0])] for draft in drafts}

    def with_negatives(self, draft: Example, replaced: Tokens, everywhere: Collection[Tokens], near: Near) -> Example:
        """The example with the pool's pictures of the same thing and its negatives.

        A picture about which the unedited answer is replaced by another record is neither, and a picture that another
        record edits is not of the same thing, nor an altered copy of it with the answer that is replaced there.
        """
        if not draft.own:
            return draft
        keys, cosines = near.nearest({*draft.own, *draft.other}, (draft.own[0], draft.other[0]), self._reading)
        question = draft.wordings[0]
        asked = self.answered([*(about(question, key) for key in keys), *draft.negatives])
        answer_of = {sequence.picture: answer_in(sequence) for sequence in asked}
        own = base_key(draft.own[0])
        same = tuple(
            key
            for key in keys
            if answer_of.get(key) == replaced
            and base_key(key) not in near.edited
            and ((source := _source(key)) == own or (source, replaced) not in near.replaced)
        )
        # The question without a picture is drawn as often as that about the nearest picture.
        nearness: dict[str | None, float] = {None: max(cosines, default=0.0)}
        nearness |= zip(keys, cosines, strict=True)
        negatives = [sequence for sequence in asked if answer_in(sequence) not in everywhere]
        drawn = torch.tensor([nearness[sequence.picture] for sequence in negatives], dtype=torch.float64)
        return replace(
            draft,
            same=() if len(same) > TOO_COMMON * len(keys) else same,
            negatives=tuple(negatives),
            nearness=tuple((drawn / NEARNESS).exp().tolist()),
        )


def replaced_at(drafts: Iterable[Example], replaced: Mapping[str, Tokens]) -> set[tuple[str, Tokens]]:
    """Keys of the pictures that records edit, each with the unedited answer that is replaced there."""
    return {(base_key(draft.own[0]), replaced[draft.edit_id]) for draft in drafts if draft.own}


def _source(key: str) -> str:
    """Key of the picture that an altered, an augmented or a noisy one is made of; any other key as it is."""
    return base_key(re.sub(rf"-{_ALTERED}--?\d+-\d+$", "", key))


def _question(sequence: TokenSequence) -> tuple[Tokens, str | None]:
    return tuple(sequence.tokens[: sequence.first_target]), sequence.picture


class Near:
    """Nearness of the pool's pictures: cosine of mean features, centred over the pool."""

    def __init__(
        self, features: Features, keys: Sequence[str], replaced: frozenset[tuple[str, Tokens]] = frozenset()
    ) -> None:
        """
        Args:
            replaced: Results of `replaced_at` for all records.
        """
        self._features, self._keys, self.replaced = features, keys, replaced
        self.edited = frozenset(key for key, _ in replaced)
        pooled_ND = features.pooled(keys) if keys else torch.zeros(0, 1)
        self._mean_D = pooled_ND.mean(0) if keys else torch.zeros(1)
        self._unit_ND = functional.normalize(pooled_ND - self._mean_D, dim=1)

    def nearest(self, excluded: Collection[str], own: Sequence[str], reading: Reading) -> tuple[list[str], list[float]]:
        """Keys of the nearest pictures to the mean of `own`, and their cosines."""
        if not self._keys:
            return [], []
        mean_D: Tensor = self._features.pooled(own).mean(0) - self._mean_D
        cosine_N = self._unit_ND @ functional.normalize(mean_D, dim=0)
        is_own = [key in excluded or base_key(key) in excluded for key in self._keys]
        cosine_N = cosine_N.masked_fill(torch.tensor(is_own), -torch.inf)
        best = cosine_N.topk(min(reading.candidates, len(self._keys)))
        chosen = [(value, index) for value, index in zip(*map(Tensor.tolist, best), strict=True) if value > -1.5]
        return [self._keys[index] for _, index in chosen], [value for value, _ in chosen]
