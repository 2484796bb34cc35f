"""Contradictions and duplicates among the records of one model."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from odedit.data.images import ImageReader
from odedit.data.records import RawRecord, read_records
from odedit.errors import InputError
from pipeline.run_folder.contradictions import LeftOut, edited_by, find
from tests.support.mmedit_files import record, write_array, write_images


@pytest.fixture
def reader(tmp_path: Path) -> ImageReader:
    roots = write_images(tmp_path, [record(number) for number in range(4)])
    copy = roots[0] / "copy.jpg"
    copy.write_bytes((roots[0] / record(0)["image"]).read_bytes())
    return ImageReader(*map(str, roots))


def read(tmp_path: Path, fields: list[dict[str, Any]]) -> list[RawRecord]:
    records = list(read_records(str(write_array(tmp_path / "a.json", fields))))
    assert not any(record.problem for record in records)
    return records


FIRST = record(0, edit_id="one", src="What  is it?", alt="a dog")
AGAIN = FIRST | {"edit_id": "two", "src": "what is IT?", "image": "copy.jpg"}
PAIRS = {
    "question": (FIRST, AGAIN | {"alt": "a cow"}, "question and picture"),
    "fact": (
        record(0, edit_id="one", fact="kind of 0", alt="a dog"),
        record(1, edit_id="two", fact="kind of 0", alt="a cow"),
        "fact ('kind of 0')",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_contradiction_names_both_records_and_the_setting(tmp_path: Path, reader: ImageReader, name: str) -> None:
    first, second, shared = PAIRS[name]
    records = read(tmp_path, [first, record(2), second])
    with pytest.raises(InputError) as raised:
        find(records, reader)
    assert str(raised.value) == (
        f"a.json, record 2 (two): it contradicts a.json, record 0 (one): the same {shared} is to have the answer "
        "'a cow', not 'a dog'. One model cannot give both. Correct one of them, or set commit.on_conflict to first or "
        "last, which keeps that one of contradictory records."
    )
    reason = (
        "left out: it contradicts a.json, record {} ({}): the same {} is to have the answer {!r}, not {!r} "
        "(commit.on_conflict={})."
    )
    assert find(records, reader, "first").reasons == {2: reason.format(0, "one", shared, "a cow", "a dog", "first")}
    kept_last = find(records, reader, "last")
    assert kept_last.reasons == {0: reason.format(2, "two", shared, "a dog", "a cow", "last")}
    assert ("two", "a cow") in (kept_last.edited.facts | kept_last.edited.questions).values()


@pytest.mark.parametrize("choice", ["refuse", "first", "last"])
def test_a_duplicate_counts_once(tmp_path: Path, reader: ImageReader, choice: Any) -> None:
    found = find(read(tmp_path, [FIRST, AGAIN | {"alt": "A  dog"}]), reader, choice)
    left, kept = (0, "record 1 (two)") if choice == "last" else (1, "record 0 (one)")
    assert found.reasons == {left: f"left out: duplicate of a.json, {kept}: same question, picture and answer."}
    assert len(found.edited.questions) == 1


def test_what_is_no_contradiction(tmp_path: Path, reader: ImageReader) -> None:
    fields = [
        FIRST,
        FIRST | {"edit_id": "other picture", "image": record(1)["image"], "alt": "a cow"},
        FIRST | {"edit_id": "other question", "src": "Who is it?", "alt": "a cow"},
        FIRST | {"edit_id": "no picture", "image": "lost.jpg", "alt": "a cow"},
        record(2, fact="f", alt="same"),
        record(3, fact="f", alt="same"),
    ]
    for entry in fields:
        entry["edit_id"] = entry.get("edit_id", entry["src"]).replace(" ", "-").replace("?", "")
    found = find(read(tmp_path, fields), reader)
    picture = reader.read(FIRST["image"])
    assert not found.reasons
    assert found.edited.facts == {"f": ("What-is-object-2", "same")}
    assert found.edited.questions[picture.key, "what is it?"] == ("one", "a dog")
    assert len(found.edited.questions) == 5, "a record without a picture is in no table"


def test_records_that_are_not_in_the_model_edit_nothing(tmp_path: Path, reader: ImageReader) -> None:
    records = read(tmp_path, [FIRST | {"fact": "a"}, record(1, edit_id="two", fact="b", alt="x")])
    assert edited_by(records, reader, {"two"}).facts == {"b": ("two", "x")}
    assert edited_by(records, reader).facts.keys() == {"a", "b"}


class _Names(ImageReader):
    """A reader whose pictures' content is their name."""

    def __init__(self) -> None:
        super().__init__(None)
        self.read_names: list[str] = []

    def read_bytes(self, path: str, root: Any = "image") -> bytes:
        self.read_names.append(path)
        return path.encode()


def test_a_hundred_thousand_records_take_seconds() -> None:
    """Each of 50,000 pictures is asked two questions, by shuffled records; one record is a planted contradiction."""
    records = [
        RawRecord("a.json", 0, f"id-{number}", "vqa", record(number // 2, src=f"What {number % 2}?", alt=str(number)))
        for number in range(100_000)
    ]
    random.Random(0).shuffle(records)
    records = [RawRecord("a.json", i, r.edit_id, r.task, r.fields) for i, r in enumerate(records)]
    reader = _Names()
    started = time.process_time()
    assert find(records, reader).reasons == {}
    assert time.process_time() - started < 15
    assert len(reader.read_names) == len(set(reader.read_names)) == 50_000
    planted = RawRecord("a.json", 100_000, "planted", "vqa", dict(records[70_000].fields) | {"alt": "other"})
    with pytest.raises(InputError, match=rf"record 100000 \(planted\): .* record 70000 \({records[70_000].edit_id}\)"):
        find([*records, planted], reader)
    assert isinstance(find([], reader), LeftOut)
