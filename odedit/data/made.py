"""Made supervision, for records that have none: general questions, and records made of any pictures.

A general question has an answer that no edit of one picture concerns. What the answer of a locality probe says only
selects the positions at which the edited and the unedited model are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace

from pyarrow.fs import FileSelector, FileType

from odedit.data.fields import IMAGE_LOCALITY, TEXT_LOCALITY, has
from odedit.data.records import RawRecord
from odedit.data.rewording import seeded
from odedit.errors import InputError
from odedit.storage.location import Location

Question = tuple[str, str]
"""A question and its answer."""
GENERAL: tuple[Question, ...] = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Canada?", "Ottawa"),
    ("Which language is spoken in Brazil?", "Portuguese"),
    ("Which language is spoken in Austria?", "German"),
    ("On which continent is Kenya?", "Africa"),
    ("On which continent is Peru?", "South America"),
    ("Which ocean lies between Europe and America?", "the Atlantic Ocean"),
    ("What is the longest river of Africa?", "the Nile"),
    ("What is the highest mountain on earth?", "Mount Everest"),
    ("How many days are in a week?", "seven"),
    ("How many months are in a year?", "twelve"),
    ("How many minutes are in an hour?", "sixty"),
    ("What is two plus two?", "four"),
    ("What is ten minus three?", "seven"),
    ("How many sides does a triangle have?", "three"),
    ("How many legs does a spider have?", "eight"),
    ("How many wheels does a bicycle have?", "two"),
    ("What do bees make?", "honey"),
    ("What do cows give?", "milk"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of big?", "small"),
    ("What is frozen water called?", "ice"),
    ("At how many degrees Celsius does water boil?", "100"),
    ("Which planet is closest to the sun?", "Mercury"),
    ("Which planet is known for its rings?", "Saturn"),
    ("What does the earth turn around?", "the sun"),
    ("Which gas do plants take from the air?", "carbon dioxide"),
    ("What is the chemical symbol of gold?", "Au"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("Who developed the theory of relativity?", "Albert Einstein"),
    ("Who was the first person on the moon?", "Neil Armstrong"),
    ("Which season follows winter?", "spring"),
    ("Which day follows Monday?", "Tuesday"),
    ("What is a young dog called?", "a puppy"),
    ("What is a young cat called?", "a kitten"),
    ("Which sport is played at Wimbledon?", "tennis"),
    ("What is bread baked from?", "flour"),
)
ABOUT_A_PICTURE: tuple[Question, ...] = (
    ("Is this a photograph or a drawing?", "a photograph"),
    ("Is the picture bright or dark?", "bright"),
    ("Is the picture in colour?", "yes"),
    ("Is the picture sharp or blurred?", "sharp"),
    ("Is the picture wide or tall?", "wide"),
    ("Was the picture taken from near or from far?", "near"),
    ("Is it day or night in the picture?", "day"),
    ("Does the picture have a frame?", "no"),
)
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of the pictures of a folder."""


def general_question(name: str, seed: int, asked: Collection[str] = ()) -> Question:
    """A general question, the same for the same arguments.

    Args:
        name: Id of the edit or of the pool's record that it is for.
        asked: Questions that are not taken, normalized by `odedit.data.pool.normal`.
    """
    free = [question for question in GENERAL if question[0].casefold() not in asked]
    return seeded(name, "general question", seed).choice(free or list(GENERAL))


def completed(record: RawRecord, seed: int = 0) -> RawRecord:
    """A record of a pool with general questions in place of missing unrelated ones, as a pool's records need them."""
    fields = dict(record.fields)
    if not has(fields, *TEXT_LOCALITY):
        fields |= zip(TEXT_LOCALITY, general_question(record.edit_id, seed), strict=True)
    if not has(fields, *IMAGE_LOCALITY):
        about = seeded(record.edit_id, "question about a picture", seed).choice(ABOUT_A_PICTURE)
        fields |= zip(IMAGE_LOCALITY, (fields["image"], *about), strict=True)
    return record if fields == record.fields else replace(record, fields=fields)


def about_pictures(paths: Sequence[str], source: str, seed: int = 0) -> list[RawRecord]:
    """Records of a pool that ask general questions about pictures.

    Args:
        paths: Paths as a record's `image` has them.
        source: Name of where they are from.
    """
    records = []
    for index, path in enumerate(paths):
        name = f"picture-{hashlib.sha256(path.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        question, answer = seeded(name, "edit", seed).choice(ABOUT_A_PICTURE)
        fields = {"image": path, "src": question, "alt": answer}
        records.append(completed(RawRecord(source, index, name, "vqa", fields), seed))
    return records


def own_pictures(records: Sequence[RawRecord]) -> list[str]:
    """Paths of the pictures that records edit, each once."""
    return list(dict.fromkeys(record.fields["image"] for record in records))


def pictures_in(folder: Location, size: int, seed: int = 0) -> list[str]:
    """Paths of up to `size` pictures of a folder and of the folders below it, relative to it, drawn uniformly.

    Raises:
        InputError: There is no such folder, or no picture in it.
    """
    try:
        infos = folder.filesystem.get_file_info(FileSelector(folder.path, recursive=True))
    except OSError as error:
        raise InputError(f"data.pictures: the folder {folder.text!r} cannot be read ({error}).") from error
    paths = sorted(
        info.path[len(folder.path) :].lstrip("/")
        for info in infos
        if info.type == FileType.File and info.path.lower().endswith(ENDINGS)
    )
    if not paths:
        raise InputError(
            f"data.pictures: the folder {folder.text!r} holds no picture; expected files that end with "
            f"{', '.join(ENDINGS)}."
        )
    rng = seeded(str(len(paths)), "pictures", seed)
    return paths if len(paths) <= size else sorted(rng.sample(paths, size))
