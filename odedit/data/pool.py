"""A bounded sample of other records, from which locality supervision is drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from odedit.data.fields import REPHRASE_PREFIX, edit_text, probe_texts, request_images
from odedit.data.images import ImageReader
from odedit.data.packed import original_path
from odedit.data.records import Check, RawRecord, read_records
from odedit.errors import InputError
from odedit.runtime.addresses import masked


@dataclass(frozen=True)
class Pool:
    """Records, of the training file as a rule, and the reader of their images.

    Attributes:
        records: Usable records only.
        reader: Opens the images they name; its roots may differ from those of the edited records.
    """

    records: Sequence[RawRecord]
    reader: ImageReader

    @classmethod
    def sample(
        cls,
        path: str,
        reader: ImageReader,
        *,
        size: int = 256,
        seed: int = 0,
        task: str = "auto",
        check: Check | None = None,
    ) -> Pool:
        """Draws `size` usable records, each with the same chance, in one pass over the file.

        Args:
            check: A further check of records that are right so far.

        Raises:
            InputError: The file cannot be read or has no usable record.
        """
        if size < 1:
            raise InputError(f"size of the pool: got {size}, expected at least 1.")
        rng = random.Random(seed)
        chosen: list[RawRecord] = []
        num_seen = 0
        for record in read_records(path, task=task, check=check):
            if record.problem:
                continue
            num_seen += 1
            if len(chosen) < size:
                chosen.append(record)
            elif (place := rng.randrange(num_seen)) < size:
                chosen[place] = record
        if not chosen:
            raise InputError(f"data.pool: {masked(path)} has no usable record; `odedit data check` says why.")
        return cls(tuple(chosen), reader)

    def candidates(self, record: RawRecord, rng: random.Random) -> Iterator[RawRecord]:
        """The records that may supervise `record`, in random order.

        Left out: the record itself, any that shares an image with it, and any whose text question is among those that
        `record` is scored on. Training on these would make the scores meaningless. Those that ask one of its questions
        about another image come last: they show nothing that is scored, but a stock of few questions needs them.
        """
        scored = _Scored.by(record)
        last = []
        for other in rng.sample(self.records, len(self.records)):
            if scored.shared_with(other):
                continue
            if normal(other.fields["m_loc_q"]) in scored.prompts:
                last.append(other)
            else:
                yield other
        yield from last

    def left_out(self, record: RawRecord) -> Counter[str]:
        """What keeps records of the pool from supervising `record`, and how many of them."""
        scored = _Scored.by(record)
        reasons = Counter(scored.shared_with(other) for other in self.records)
        del reasons[""]
        return reasons


@dataclass(frozen=True)
class _Scored:
    """What a record is scored on, to be kept out of what supervises it."""

    record: RawRecord
    images: set[str]
    prompts: set[str]

    @classmethod
    def by(cls, record: RawRecord) -> _Scored:
        return cls(record, image_names(record), scored_prompts(record))

    def shared_with(self, other: RawRecord) -> str:
        """What another record has in common with it, in words; empty if nothing that matters."""
        own = self.record
        if (other.file, other.index) == (own.file, own.index) or other.edit_id == own.edit_id:
            return "the record itself"
        if normal(other.fields["loc"]) in self.prompts:
            return "the same text question (field 'loc')"
        return "one of its pictures" if self.images & image_names(other) else ""


def image_names(record: RawRecord) -> set[str]:
    """The images of a record by the paths its file had, so that packed and unpacked files compare."""
    return {original_path(reference.path).removeprefix(REPHRASE_PREFIX) for reference in request_images(record.fields)}


def scored_prompts(record: RawRecord) -> set[str]:
    """The prompts that a record is scored on, each as `normal` has it."""
    probes = [edit_text(record.fields, record.task), *probe_texts(record.fields, record.task).values()]
    return {normal(probe.prompt) for probe in probes}


def normal(text: str) -> str:
    """A prompt without what does not make it another: case and spaces."""
    return " ".join(text.casefold().split())
