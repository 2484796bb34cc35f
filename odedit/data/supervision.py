"""Edit requests from records, with supervision that is disjoint from the scored probes.

By default no scored probe is trained on. If a record has no `held_out` supervision, rephrases are made from the
edit itself, and unrelated questions are drawn from a pool of other records, or of any pictures. Sources named `record`
train on the record's own probes instead, as published runs of some methods do, where the record has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Le

from odedit.data.fields import (
    ImageReference,
    ProbeText,
    edit_text,
    held_out_texts,
    image_reference,
    old_answer,
    probe_texts,
)
from odedit.data.images import ImageError, ImageReader
from odedit.data.made import general_question
from odedit.data.pool import Pool, normal, scored_prompts
from odedit.data.records import RawRecord
from odedit.data.rewording import Augmentation, blend_noise, may_mirror, replace_words, reword, seeded, words_of
from odedit.errors import InputError, StorageError
from odedit.inputs.batch import (
    LOCALITY_SLOTS,
    NEAR,
    REPHRASE_SLOTS,
    EditRequest,
    Picture,
    Probe,
    rephrase_slots,
    unnumbered,
)
from odedit.settings import Settings

T = TypeVar("T")
Source = Literal["held_out", "record"]
_RECORD_SLOTS = {
    "text_rephrase": "t_gen",
    "image_rephrase": "m_gen",
    "text_locality": "t_loc",
    "image_locality": "m_loc",
    "near_locality": "m_loc_near",
}
_POOL_REMEDY = (
    "Set data.pool to a file of other records (the training file), give the records `held_out` entries of their own, "
    "or set supervision.locality_source to 'record', which trains on the questions that locality is scored on."
)
_RECORDS_TRIED, _PICTURES_TRIED = 256, 3
"""Limits of `check_pool`: number of tried records, and of tried records without a readable pool picture."""


@dataclass(frozen=True)
class Supervision(Settings):
    """Sources of supervision.

    Attributes:
        rephrase_source: `held_out`: the record's `held_out` entries, else made from the edit. `record`: the rephrases
            that are scored, else made from the edit.
        locality_source: `held_out`: the record's `held_out` entries, else `data.pool`, else general questions and the
            pictures of `data.pictures` or of the other records. `record`: the locality questions that are scored, else
            the same.
        rephrases: Number of text rephrases and of image rephrases; those that a record does not give are made. A
            question may have fewer built-in wordings, and then has fewer text rephrases.
        near_locality: Also ask the edit's own question about another picture.
        rephrase_noise: Share, 0 to 1, of the text rephrase's words that are replaced by words of other records'
            questions, and of uniform noise in the image rephrase. Scored prompts and pictures are not changed.
        seed: Seed of every draw, together with the edit id.
    """

    rephrase_source: Source = "held_out"
    locality_source: Source = "held_out"
    rephrases: Annotated[int, Ge(1)] = 1
    near_locality: bool = True
    rephrase_noise: Annotated[float, Ge(0), Le(1)] = 0.0
    seed: int = 0


def build_request(
    record: RawRecord,
    reader: ImageReader,
    supervision: Supervision,
    pool: Pool | None = None,
    *,
    locality: bool = True,
) -> EditRequest:
    """Reads a record's images, and builds its probes and its supervision.

    Args:
        record: Record without a problem.
        reader: Reader of the record's images.
        supervision: Sources of supervision.
        pool: Other records; needed for held-out locality unless the record has its own.
        locality: Whether to build locality supervision; needless if neither objective nor editor reads it.

    Raises:
        ImageError: An image of the record cannot be used; the caller skips the record.
        InputError: Held-out locality is needed, and no pool record can provide it.
        ValueError: The record has a problem.
    """
    if record.problem:
        raise ValueError(f"{record.edit_id}: {record.problem}")
    pictures = _Pictures(reader)
    edit = pictures.probe(edit_text(record.fields, record.task))
    probes = {name: pictures.probe(text) for name, text in probe_texts(record.fields, record.task).items()}
    own = {slot: pictures.probe(text) for slot, text in held_out_texts(record.fields, record.task).items()}
    slots = _rephrases(record, edit, probes, own, supervision)
    if supervision.rephrase_noise:
        slots = _with_noise(record.edit_id, slots, supervision, pool)
    unrelated, drawn_from = _locality(record, edit, probes, own, supervision, pool) if locality else ({}, "")
    optional = {"pool_record": drawn_from, "fact": record.fields.get("fact")}
    meta = {"file": record.file, "index": str(record.index)} | {name: text for name, text in optional.items() if text}
    return EditRequest(record.edit_id, edit, slots | unrelated, probes, record.task, meta, old_answer(record.fields))


def check_pool(records: Iterable[RawRecord], reader: ImageReader, supervision: Supervision, pool: Pool) -> None:
    """Checks, before a run, that the pool can supervise at least one of the first records.

    Args:
        records: Usable records that will be edited.
        reader: Reader of their images.

    Raises:
        InputError: The pool can supervise none of them.
    """
    if supervision.locality_source == "record" or pool.is_made:
        return
    num_unreadable, error, blocked = 0, "", None
    for record in islice(records, _RECORDS_TRIED):
        draws = _wanted(supervision) - set(held_out_texts(record.fields, record.task))
        if draws and sum(pool.left_out(record).values()) == len(pool.records):
            blocked = blocked or record
            continue
        try:
            build_request(record, reader, supervision, pool)
        except ImageError:
            continue  # an image of the record itself; its row will report it
        except StorageError:
            return
        except InputError as input_error:
            num_unreadable, error = num_unreadable + 1, str(input_error)
            if num_unreadable == _PICTURES_TRIED:
                break
            continue
        return
    if error:
        raise InputError(
            f"{error} The pictures of data.pool are read from data.image_root and data.rephrase_root, like those of "
            "data.path. Put them there, or pack the pool with its own folders (`odedit data pack`) and set data.pool "
            "to the packed folder."
        )
    if blocked is not None:
        shared = "; ".join(f"{count} with {what}" for what, count in pool.left_out(blocked).most_common())
        raise InputError(
            f"data.pool: none of its {len(pool.records)} records can supervise the records of data.path: unrelated "
            f"questions must share nothing with what is scored, and for {blocked.edit_id}, for example, the pool has "
            f"{shared}. {_POOL_REMEDY}"
        )


class _Pictures:
    """Pictures of one record, each read once."""

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader
        self._read: dict[ImageReference, Picture] = {}

    def probe(self, text: ProbeText) -> Probe:
        picture = None if text.image is None else self.picture(text.image)
        return Probe(text.prompt, text.target, picture, text.is_caption, text.fact, text.entity)

    def picture(self, reference: ImageReference) -> Picture:
        if reference not in self._read:
            self._read[reference] = self._reader.read(reference.path, reference.root)
        return self._read[reference]


def _rephrases(
    record: RawRecord, edit: Probe, probes: dict[str, Probe], own: dict[str, Probe], supervision: Supervision
) -> dict[str, Probe]:
    given = _given(probes, own, supervision.rephrase_source)
    wordings = made_wordings(record, {slot: probe.prompt for slot, probe in given.items()}, supervision)

    def augmented(slot: str) -> Probe:
        assert edit.picture is not None, "every record has an image"
        return replace(edit, picture=augmentation(record, supervision.seed, slot).of(edit.picture))

    slots: dict[str, Probe] = {}
    for slot in rephrase_slots(supervision.rephrases):
        if slot in given:
            slots[slot] = given[slot]
        elif slot in wordings:
            slots[slot] = replace(edit, prompt=wordings[slot])
        elif unnumbered(slot) == REPHRASE_SLOTS[1]:
            slots[slot] = augmented(slot)
    return slots


def made_wordings(record: RawRecord, given: Mapping[str, str], supervision: Supervision) -> dict[str, str]:
    """Built-in wordings of a record's question by slot; further slots than there are wordings have none.

    Args:
        given: Prompts of the rephrases that the record gives, by slot.
    """
    question = record.fields["src"]
    used = scored_prompts(record)
    wordings: dict[str, str] = {}
    for slot in rephrase_slots(supervision.rephrases):
        if unnumbered(slot) != REPHRASE_SLOTS[0]:
            continue
        if slot in given:
            used.add(normal(given[slot]))
            continue
        wording = reword(question, record.task, seeded(record.edit_id, slot, supervision.seed), used)
        # Without another wording the first rephrase has the question's own, in another picture.
        if slot == REPHRASE_SLOTS[0] or normal(wording) != normal(question):
            wordings[slot] = wording
            used.add(normal(wording))
    return wordings


def augmentation(record: RawRecord, seed: int, slot: str = REPHRASE_SLOTS[1]) -> Augmentation:
    """The changes that make a record's image rephrase of a slot."""
    rng = seeded(record.edit_id, slot, seed)
    return Augmentation.drawn(rng, may_mirror=may_mirror(record.fields["src"], record.fields["alt"]))


def given_slots(probes: Mapping[str, T], own: Mapping[str, T], supervision: Supervision) -> dict[str, T]:
    """What a record gives by supervision slot, its rephrases and its unrelated questions each from their source."""
    rephrases, unrelated = (
        _given(probes, own, source) for source in (supervision.rephrase_source, supervision.locality_source)
    )
    return {slot: part for slot, part in rephrases.items() if unnumbered(slot) in REPHRASE_SLOTS} | {
        slot: part for slot, part in unrelated.items() if slot in LOCALITY_SLOTS
    }


def _given(probes: Mapping[str, T], own: Mapping[str, T], source: Source) -> dict[str, T]:
    """What a record gives by supervision slot: its scored probes, or its `held_out` entries."""
    if source == "held_out":
        return dict(own)
    return {slot: probes[name] for slot, name in _RECORD_SLOTS.items() if name in probes}


def _with_noise(
    edit_id: str, rephrases: dict[str, Probe], supervision: Supervision, pool: Pool | None
) -> dict[str, Probe]:
    """The rephrases with noise, as new objects: the given ones may be scored probes."""
    vocabulary = [] if pool is None else words_of([other.fields["src"] for other in pool.records])
    noisy = {}
    for slot, probe in rephrases.items():
        rng = seeded(edit_id, slot.replace("_rephrase", "_noise"), supervision.seed)
        if unnumbered(slot) == REPHRASE_SLOTS[0]:
            prompt = replace_words(probe.prompt, supervision.rephrase_noise, rng, vocabulary)
            noisy[slot] = replace(probe, prompt=prompt)
        elif probe.picture is not None:
            noisy[slot] = replace(probe, picture=blend_noise(probe.picture, supervision.rephrase_noise, rng))
    return rephrases | noisy


def rephrase_distance(request: EditRequest) -> float | None:
    """Distance of the supervising text rephrase from the edit's prompt: 1 - Jaccard overlap of their word sets.

    Case and punctuation are ignored. None if there is no text rephrase, or neither prompt has a word.
    """
    rephrase = request.supervision.get("text_rephrase")
    if rephrase is None:
        return None
    edit, other = (set(re.findall(r"\w+", text.casefold())) for text in (request.edit.prompt, rephrase.prompt))
    return 1 - len(edit & other) / len(edit | other) if edit | other else None


def _wanted(supervision: Supervision) -> set[str]:
    """Locality slots that an edit needs."""
    return {slot for slot in LOCALITY_SLOTS if slot != NEAR or supervision.near_locality}


def _locality(
    record: RawRecord,
    edit: Probe,
    probes: dict[str, Probe],
    own: dict[str, Probe],
    supervision: Supervision,
    pool: Pool | None,
) -> tuple[dict[str, Probe], str]:
    """The locality slots, and the edit id of the pool record that was drawn, if any."""
    wanted = [slot for slot in LOCALITY_SLOTS if slot in _wanted(supervision)]
    given = _given(probes, own, supervision.locality_source)
    slots = {slot: given[slot] for slot in wanted if slot in given}
    missing = [slot for slot in wanted if slot not in slots]
    unrelated = slots.get("image_locality")
    may_share = supervision.locality_source == "record" or pool is None
    if NEAR in missing and may_share and unrelated is not None and unrelated.picture is not None:
        slots[NEAR] = _near(edit, unrelated)
        missing.remove(NEAR)
    if not missing:
        return slots, ""
    if pool is None:
        raise InputError(
            f"{record.file}, record {record.index}: has no held_out entry for {' and '.join(missing)}, and there is no "
            f"pool of other records. {_POOL_REMEDY}"
        )
    drawn, drawn_from = _draw(record, edit, probes, missing, supervision, pool)
    return slots | drawn, drawn_from


def lacks_locality(record: RawRecord, supervision: Supervision) -> bool:
    """Whether a record gives too few unrelated questions, so that a pool must."""
    task = record.task
    given = _given(probe_texts(record.fields, task), held_out_texts(record.fields, task), supervision.locality_source)
    return not {"text_locality", "image_locality"} <= given.keys()


def _near(edit: Probe, other: Probe) -> Probe:
    """The edit's question about the other probe's picture."""
    return replace(edit, target=other.target, picture=other.picture)


def _draw(
    record: RawRecord,
    edit: Probe,
    probes: dict[str, Probe],
    missing: list[str],
    supervision: Supervision,
    pool: Pool,
) -> tuple[dict[str, Probe], str]:
    """Slots from the first candidate whose images can be read and are not scored, in an order set by the edit id."""
    scored_keys = {probe.picture.key for probe in (edit, *probes.values()) if probe.picture is not None}
    rng = seeded(record.edit_id, "locality", supervision.seed)
    num_tried, last_error = 0, ""
    for other in pool.candidates(record, rng):
        num_tried += 1
        try:
            drawn = _locality_of(other, edit, missing, pool.reader)
        except ImageError as error:
            last_error = f" Last one: {error}"
            continue
        if all(probe.picture is None or probe.picture.key not in scored_keys for probe in drawn.values()):
            return drawn, other.edit_id
    if pool.is_made:  # no picture but the record's own
        question = Probe(*general_question(record.edit_id, supervision.seed, scored_prompts(record)))
        return {slot: question for slot in missing if slot == "text_locality"}, ""
    raise InputError(
        f"data.pool: none of its {len(pool.records)} records can supervise {record.edit_id}: {num_tried} share no "
        f"image or question with it, and none of those has images that can be read.{last_error} Use a larger pool."
    )


def _locality_of(other: RawRecord, edit: Probe, missing: list[str], reader: ImageReader) -> dict[str, Probe]:
    """The missing slots, from one record of the pool. Targets only set the positions that are compared."""
    texts = probe_texts(other.fields, other.task)
    answer = old_answer(other.fields) or other.fields["m_loc_a"]
    candidates = {
        "text_locality": texts["t_loc"],
        "image_locality": texts["m_loc"],
        "near_locality": ProbeText(edit.prompt, answer, image_reference(other.fields["image"]), edit.is_caption),
    }
    pictures = _Pictures(reader)
    return {slot: pictures.probe(candidates[slot]) for slot in missing}
