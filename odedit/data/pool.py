"""Pool of other records from which locality supervision is drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from odedit.data.fields import (
    REPHRASE_PREFIX,
    edit_text,
    probe_texts,
    request_images,
    scored_things,
    supervising_things,
)
from odedit.data.images import ImageReader
from odedit.data.made import completed
from odedit.data.packed import original_path
from odedit.data.records import Check, RawRecord, read_records
from odedit.errors import InputError
from odedit.runtime.addresses import masked


@dataclass(frozen=True)
class Pool:
    """Sample of other records, usually of the training file.

    Attributes:
        records: Usable records.
        reader: Reader of their images; its roots may differ from those of the edited records.
        is_made: True for records made of pictures (`odedit.data.made`), possibly of those that the run's records have.
        is_own: True for records made of the pictures that the run's records edit.
    """

    records: Sequence[RawRecord]
    reader: ImageReader
    is_made: bool = False
    is_own: bool = False

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
        columns: Mapping[str, str] = MappingProxyType({}),
    ) -> Pool:
        """Draws `size` usable records uniformly, in one pass over the file (reservoir sampling).

        Args:
            check: Additional check of valid records; see `read_records`.
            columns: Columns of the file by field.

        Raises:
            InputError: The file cannot be read or has no usable record.
        """
        if size < 1:
            raise InputError(f"size of the pool: got {size}, expected at least 1.")
        rng = random.Random(seed)
        chosen: list[RawRecord] = []
        num_seen = 0
        for record in read_records(path, task=task, check=check, columns=columns):
            if record.problem:
                continue
            num_seen += 1
            if len(chosen) < size:
                chosen.append(record)
            elif (index := rng.randrange(num_seen)) < size:
                chosen[index] = record
        if not chosen:
            raise InputError(f"data.pool: {masked(path)} has no usable record; `odedit data check` says why.")
        return cls(tuple(completed(record, seed) for record in chosen), reader)

    def candidates(self, record: RawRecord, rng: random.Random) -> Iterator[RawRecord]:
        """The records that may supervise `record`, in random order.

        Excluded, since training on them would leak scored probes: the record itself, records that share an image with
        it, records whose text question is one of its scored prompts, and records about a fact or an entity whose
        answer must stay in a scored probe, where both records name it. Records with one of its questions about another
        image come last, for files with few distinct questions.
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
        """Number of pool records that cannot supervise `record`, by reason."""
        scored = _Scored.by(record)
        reasons = Counter(scored.shared_with(other) for other in self.records)
        del reasons[""]
        return reasons


@dataclass(frozen=True)
class _Scored:
    """Images and prompts that a record is scored on, and the named things whose answers must stay."""

    record: RawRecord
    images: set[str]
    prompts: set[str]
    things: frozenset[str]

    @classmethod
    def by(cls, record: RawRecord) -> _Scored:
        things = scored_things(record.fields, record.task)
        return cls(record, image_names(record), scored_prompts(record), things)

    def shared_with(self, other: RawRecord) -> str:
        """The reason why `other` cannot supervise the record; empty if it can."""
        own = self.record
        if (other.file, other.index) == (own.file, own.index) or other.edit_id == own.edit_id:
            return "the record itself"
        if normal(other.fields["loc"]) in self.prompts:
            return "the same text question (field 'loc')"
        if self.images & image_names(other):
            return "one of its pictures"
        return "a scored fact or entity" if self.things & supervising_things(other.fields) else ""


def image_names(record: RawRecord) -> set[str]:
    """Original image paths of a record: the same for packed and unpacked files."""
    return {original_path(reference.path).removeprefix(REPHRASE_PREFIX) for reference in request_images(record.fields)}


def scored_prompts(record: RawRecord) -> set[str]:
    """Prompts that a record is scored on, normalized by `normal`."""
    probes = [edit_text(record.fields, record.task), *probe_texts(record.fields, record.task).values()]
    return {normal(probe.prompt) for probe in probes}


def normal(text: str) -> str:
    """A prompt in lower case with single spaces."""
    return " ".join(text.casefold().split())
