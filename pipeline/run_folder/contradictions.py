"""Records of one run that cannot all be in one model: contradictions and duplicates, found before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from odedit.data.fields import ImageReference, edit_text, shorten
from odedit.data.images import KEY_LENGTH, ImageError, ImageReader
from odedit.data.pool import normal
from odedit.data.records import RawRecord
from odedit.errors import InputError
from odedit.evaluation.edited import Edited
from odedit.runtime.brief import brief

SETTING = "commit.on_conflict"
OnConflict = Literal["refuse", "first", "last"]
_READERS = 8
"""Pictures that are read at the same time."""


@dataclass(frozen=True)
class LeftOut:
    """Records that are left out of a model, and what the others edit.

    Attributes:
        reasons: Reason per left-out record, by the record's index.
        edited: What the other records edit.
    """

    reasons: Mapping[int, str] = field(default_factory=dict)
    edited: Edited = field(default_factory=Edited)

    __repr__ = brief


@dataclass(frozen=True)
class _Edit:
    """What one record edits.

    Attributes:
        question: Key of the picture and the question, normalized.
    """

    file: str
    index: int
    edit_id: str
    fact: str | None
    question: tuple[str, str]
    answer: str

    def __str__(self) -> str:
        return f"{self.file}, record {self.index} ({self.edit_id})"


def find(records: Iterable[RawRecord], reader: ImageReader, on_conflict: OnConflict = "refuse") -> LeftOut:
    """Finds records with the same `fact`, or the same question about the same picture, and different answers.

    Questions and answers are compared without regard to case and white space, pictures by their content. Of records
    that are equal in all three, one is kept. A record whose picture cannot be read is ignored here.

    Args:
        records: Usable records of a run.
        reader: Reader of their pictures; each is read once.
        on_conflict: `refuse` raises for a contradiction, `first` and `last` keep the first or the last record of one.

    Raises:
        InputError: Two records contradict each other; the message names both.
        StorageError: The storage of the pictures kept failing.
    """
    edits = _edits(records, reader)
    kept = _Kept()
    reasons: dict[int, str] = {}
    for edit in reversed(edits) if on_conflict == "last" else edits:
        other = kept.contradicting(edit)
        if other is not None and on_conflict == "refuse":
            raise InputError(_refusal(other, edit))
        if other is not None:
            reasons[edit.index] = f"left out: {_contradiction(edit, other)} ({SETTING}={on_conflict})."
        elif (same := kept.equal(edit)) is not None:
            reasons[edit.index] = f"left out: duplicate of {same}: same question, picture and answer."
        else:
            kept.add(edit)
    return LeftOut(reasons, kept.edited())


def edited_by(records: Iterable[RawRecord], reader: ImageReader, edit_ids: Collection[str] | None = None) -> Edited:
    """What the records edit, of contradictory ones the first.

    Args:
        edit_ids: Ids of the records that are in the model; None: all.
    """
    chosen = (record for record in records if edit_ids is None or record.edit_id in edit_ids)
    return find(chosen, reader, "first").edited


class _Kept:
    """Records that are kept, by fact and by question."""

    def __init__(self) -> None:
        self._by_fact: dict[str, _Edit] = {}
        self._by_question: dict[tuple[str, str], _Edit] = {}

    def contradicting(self, edit: _Edit) -> _Edit | None:
        """A kept record with the same fact or question and another answer."""
        same = (self._by_question.get(edit.question), self._by_fact.get(edit.fact) if edit.fact else None)
        return next(
            (other for other in same if other is not None and normal(other.answer) != normal(edit.answer)), None
        )

    def equal(self, edit: _Edit) -> _Edit | None:
        """A kept record with the same question; its answer is the same if it does not contradict."""
        return self._by_question.get(edit.question)

    def add(self, edit: _Edit) -> None:
        self._by_question[edit.question] = edit
        if edit.fact:
            self._by_fact.setdefault(edit.fact, edit)

    def edited(self) -> Edited:
        return Edited(
            {fact: (edit.edit_id, edit.answer) for fact, edit in self._by_fact.items()},
            {question: (edit.edit_id, edit.answer) for question, edit in self._by_question.items()},
        )


def _edits(records: Iterable[RawRecord], reader: ImageReader) -> list[_Edit]:
    """What each record edits, without records whose picture cannot be read."""
    edits, images = [], []
    for record in records:
        text, fact = edit_text(record.fields, record.task), record.fields.get("fact")
        edits.append(_Edit(record.file, record.index, record.edit_id, fact, ("", normal(text.prompt)), text.target))
        images.append(text.image)
    references = [image for image in dict.fromkeys(images) if image is not None]
    keys: dict[ImageReference | None, str | None] = {None: ""}
    with ThreadPoolExecutor(_READERS) as pool:
        keys |= zip(references, pool.map(lambda reference: _key(reference, reader), references), strict=True)
    return [
        replace(edit, question=(key, edit.question[1]))
        for edit, image in zip(edits, images, strict=True)
        if (key := keys[image]) is not None
    ]


def _key(reference: ImageReference, reader: ImageReader) -> str | None:
    """`Picture.key` of an image, without decoding it; None if it cannot be read."""
    try:
        return hashlib.sha256(reader.read_bytes(reference.path, reference.root)).hexdigest()[:KEY_LENGTH]
    except ImageError:
        return None


def _contradiction(edit: _Edit, other: _Edit) -> str:
    shared = "question and picture" if edit.question == other.question else f"fact ({shorten(repr(edit.fact))})"
    answers = f"{shorten(repr(edit.answer))}, not {shorten(repr(other.answer))}"
    return f"it contradicts {other}: the same {shared} is to have the answer {answers}"


def _refusal(first: _Edit, second: _Edit) -> str:
    return (
        f"{second}: {_contradiction(second, first)}. One model cannot give both. Correct one of them, or set {SETTING} "
        "to first or last, which keeps that one of contradictory records."
    )
