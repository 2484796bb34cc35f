"""Where an edit's supervision is from: given by the record, drawn from a pool of records, made, or missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from odedit.data.fields import held_out_texts, old_answer, probe_texts
from odedit.data.records import RawRecord
from odedit.data.supervision import Supervision, augmentation, given_slots, made_wordings
from odedit.inputs.batch import EDIT, NEAR, SUPERVISION_SLOTS, rephrase_slots, unnumbered

NEGATIVES, OLD_ANSWER = "negatives", "old_answer"
"""Supervision beside the slots: pictures for hard negatives, and the answer that the edit replaces."""


@dataclass(frozen=True)
class Wanted:
    """Supervision that a run reads.

    Attributes:
        slots: Slots of `SUPERVISION_SLOTS`, and `NEGATIVES`.
        source: Name of the pool that missing supervision is from; empty: there is none.
        is_made: True for a pool that is made of pictures.
        num_pictures: Number of pictures of the pool.
    """

    slots: Collection[str]
    source: str = ""
    is_made: bool = False
    num_pictures: int = 0


@dataclass(frozen=True)
class Origins:
    """Origin of each supervision that one record's edit reads.

    Attributes:
        given: Names of what the record gives.
        drawn: Names of what a pool of records gives.
        made: How each other one is made, by name.
        missing: Names of what nothing gives.
    """

    given: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    made: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def made_text(self) -> str:
        """What is made, in words."""
        return "; ".join(f"{name}: {how}" for name, how in self.made.items())


def origins(record: RawRecord, supervision: Supervision, wanted: Wanted) -> Origins:
    """Origin of the supervision of a usable record."""
    probes, own = probe_texts(record.fields, record.task), held_out_texts(record.fields, record.task)
    known = given_slots(probes, own, supervision)
    more = rephrase_slots(supervision.rephrases)[2:]
    slots = [slot for slot in (*SUPERVISION_SLOTS, *more, NEGATIVES) if unnumbered(slot) in wanted.slots]
    given = [slot for slot in slots if slot in known]
    wordings = made_wordings(record, {slot: known[slot].prompt for slot in given}, supervision)
    drawn: list[str] = []
    made: dict[str, str] = {}
    missing: list[str] = []
    for slot in slots:
        if slot in given or slot == EDIT or (slot == NEAR and not supervision.near_locality):
            continue
        if unnumbered(slot) == "text_rephrase":
            if slot in wordings:
                made[slot] = "a built-in wording"
            else:
                missing.append(slot)
        elif unnumbered(slot) == "image_rephrase":
            made[slot] = str(augmentation(record, supervision.seed, slot))
        elif wanted.source and not wanted.is_made:
            drawn.append(slot)
        elif slot == "text_locality":
            made[slot] = "a general question"
        elif wanted.num_pictures > 1:
            made[slot] = _pictured(slot, wanted.source)
        else:
            missing.append(slot)
    if NEGATIVES in wanted.slots:
        if old_answer(record.fields) is None:
            made[OLD_ANSWER] = "asked from the model"
        else:
            given.append(OLD_ANSWER)
    return Origins(tuple(given), tuple(drawn), made, tuple(missing))


def _pictured(slot: str, source: str) -> str:
    if slot == "image_locality":
        return f"a general question about one of {source}"
    return f"the question about one of {source}" if slot == NEAR else f"the question about others of {source}"


def counted(records: Iterable[RawRecord], supervision: Supervision, wanted: Wanted) -> dict[str, Counter[str]]:
    """Number of records by name of the supervision and by origin: given, drawn, made, missing."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        found = origins(record, supervision, wanted)
        for origin in ("given", "drawn", "made", "missing"):
            for name in getattr(found, origin):
                counts.setdefault(name, Counter())[origin] += 1
    return counts
