"""Examples of many records, some records at a time.

The unedited answer to each record's question stays in memory; its negatives are in a temporary file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from odedit.backbones.base import Backbone
from odedit.errors import InputError
from odedit.inputs.batch import EditRequest
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.prompts import Template
from odedit.runtime import parallel
from odedit.runtime.brief import brief
from odedit.ways.common.examples import (
    Example,
    KnownStates,
    Maker,
    Near,
    Reading,
    ReadPool,
    Tokens,
    read_pool,
    replaced_at,
    still_kept,
)
from odedit.ways.common.sequences import Features

_RECORDS_AT_ONCE = 32

Progress = tuple[str, int, int]
"""What is done, how many of how many."""


@dataclass
class InParts:
    """The pool's examples, and those of records part by part.

    Attributes:
        features: Features of the pool's pictures and, while a part is read, of its records' pictures.
        kept: Questions of the pool whose answers stay, with the unedited answers; known after `survey`.
        problems: Reason per record that the model does not take, by edit id; known after `survey`.
    """

    backbone: Backbone
    template: Template
    reading: Reading
    folder: Path
    features: Features = field(init=False)
    kept: Sequence[TokenSequence] = ()
    problems: dict[str, str] = field(default_factory=dict)

    __repr__ = brief

    def __post_init__(self) -> None:
        self.features = Features(self.backbone)
        self._maker = Maker(self.backbone, self.template, self.features, self.reading, KnownStates(limit=0))
        self._replaced: dict[str, Tokens] = {}
        self._everywhere: frozenset[Tokens] = frozenset()
        self._end: int | None = None

    @property
    def has_end(self) -> bool:
        """Whether the records' answers have the token that ends them; known after `survey`."""
        return self._end is not None

    def survey(self, requests: Sequence[EditRequest], pool: Sequence[EditRequest]) -> Iterator[Progress]:
        """Reads the pool, and asks the unedited model every record's question; yields what is done."""
        asked: list[TokenSequence] = []
        keys: list[str] = []
        for progress in read_pool(self._maker, pool):
            if isinstance(progress, ReadPool):
                keys, asked = progress
            else:
                yield progress
        self._end = self._maker.end(asked, requests)
        self._of_pool = dict(self.features.by_key), self._maker.known_answers()
        replaced_there: set[tuple[str, Tokens]] = set()
        for start in range(0, len(requests), _RECORDS_AT_ONCE):
            yield "answers to the records", start, len(requests)
            drafts = self._drafts(requests[start : start + _RECORDS_AT_ONCE], is_survey=True)
            self._replaced |= self._maker.replaced(drafts)
            replaced_there |= replaced_at(drafts, self._replaced)
            self._forget()
        replaced = parallel.gathered(list(self._replaced.values()))
        self._everywhere = frozenset(answer for answers in replaced for answer in answers)
        edited = frozenset(pair for pairs in parallel.gathered(replaced_there) for pair in pairs)
        self._near = Near(self.features, keys, edited)
        self.kept = still_kept(asked, self._everywhere)

    def parts(self, requests: Sequence[EditRequest]) -> Iterator[list[Example]]:
        """Examples of the records without a problem, in their order; a part's features are dropped after it."""
        for start in range(0, len(requests), _RECORDS_AT_ONCE):
            part = requests[start : start + _RECORDS_AT_ONCE]
            yield self._with_negatives(start, self._drafts(part))
            self._forget()

    def _drafts(self, part: Sequence[EditRequest], is_survey: bool = False) -> list[Example]:
        drafts = []
        for request in part:
            if request.edit_id in self.problems:
                continue
            try:
                drafts.append(self._maker.draft(request, self._end, copies=not is_survey))
            except (InputError, ValueError) as error:
                self.problems[request.edit_id] = str(error)
        return drafts

    def _with_negatives(self, start: int, drafts: Sequence[Example]) -> list[Example]:
        """The examples with their negatives, from the part's file once that is written."""
        file = self.folder / f"negatives-{start}.json"
        if file.exists():
            stored = json.loads(file.read_text())
            return [
                replace(
                    draft,
                    same=tuple(entry["same"]),
                    negatives=tuple(TokenSequence(**values) for values in entry["negatives"]),
                    nearness=tuple(entry["nearness"]),
                )
                for draft, entry in zip(drafts, stored, strict=True)
            ]
        examples = [
            self._maker.with_negatives(draft, self._replaced[draft.edit_id], self._everywhere, self._near)
            for draft in drafts
        ]
        entries = [
            {
                "same": example.same,
                "negatives": [asdict(replace(sequence, image=list(sequence.image))) for sequence in example.negatives],
                "nearness": example.nearness,
            }
            for example in examples
        ]
        file.write_text(json.dumps(entries))
        return examples

    def _forget(self) -> None:
        """Drops everything that is not of the pool."""
        features, answers = self._of_pool
        self.features.by_key = dict(features)
        self._maker.forget_all_but(answers)
