"""Records of one's own: a picture, a question and a right answer, under the names that a file has."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from odedit.data.fields import probe_texts, request_images
from odedit.data.ids import Digests, content_id
from odedit.data.images import ImageError, ImageReader
from odedit.data.pack import pack
from odedit.data.records import RawRecord, read_records
from odedit.data.roots import root_of
from odedit.data.template import TEMPLATE
from odedit.errors import InputError, StorageError
from tests.support.mmedit_files import encoded, picture, record, write_array

PLAIN = {"image": "a.png", "question": "what is this?", "answer": "a dog"}


def read(path: Path, values: list[Any], **options: Any) -> list[RawRecord]:
    path.write_text("\n".join(map(json.dumps, values)))
    return list(read_records(str(path), **options))


def one(tmp_path: Path, value: Any, **options: Any) -> RawRecord:
    return read(tmp_path / "a.jsonl", [value], **options)[0]


@pytest.mark.parametrize(
    "names",
    [("image", "question", "answer"), ("image", "src", "alt"), ("images", "question", "alt")],
)
def test_three_fields_are_a_record_under_plain_names_and_under_those_of_mmedit(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    item = one(tmp_path, dict(zip(names, PLAIN.values(), strict=True)))
    assert item.problem == "" and [item.fields[name] for name in ("image", "src", "alt")] == list(PLAIN.values())
    assert probe_texts(item.fields, item.task) == {}
    assert [image.path for image in request_images(item.fields)] == ["a.png"]


def test_other_names_are_given_as_columns(tmp_path: Path) -> None:
    columns = {"question": "prompt", "answer": "label", "old_answer": "model said"}
    value = {"image": "a.png", "prompt": "what is this?", "label": "a dog", "model said": "a cat"}
    item = one(tmp_path, value, columns=columns)
    assert item.problem == "" and item.fields["pred"] == "a cat"
    assert one(tmp_path, PLAIN, columns=columns).problem == "", "the plain names are still read"
    missing = one(tmp_path, {"image": "a.png", "prompt": "what?"}, columns=columns)
    assert missing.problem == "missing field: field 'label' is not there"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "missing fields: 'image', 'question' and 'answer' are not there"),
        ({"src": "what?"}, "missing fields: 'image' and 'alt' are not there"),
        ({"question": "what?", "image": "a.png"}, "missing field: field 'answer' is not there"),
        (PLAIN | {"question": ""}, "empty field: field 'question' is empty"),
        (PLAIN | {"answer": ""}, "not an edit: field 'answer' is empty"),
        (PLAIN | {"loc": "who?"}, "missing field: field 'loc_ans' is not there"),
        (PLAIN | {"m_loc": "b.png"}, "missing fields: 'm_loc_q' and 'm_loc_a' are not there"),
        (PLAIN | {"image": ["a.png", "b.png"]}, "several pictures: field 'image' lists 2, and an edit is about one"),
        (PLAIN | {"video": "a.mp4"}, "video: field 'video' names one"),
        (PLAIN | {"image": "clips/a.MP4"}, "video: field 'image' names one"),
        (PLAIN | {"image": 3}, "wrong type: field 'image' is a number"),
        (PLAIN | {"question": "what <image> is it?"}, "image marker: field 'question' holds '<image>'"),
        (PLAIN | {"answer": "\ud800"}, "invalid text: field 'answer' holds bytes that are no UTF-8"),
    ],
)
def test_every_problem_names_the_fields_as_the_file_does(tmp_path: Path, value: Any, said: str) -> None:
    assert one(tmp_path, value).problem.startswith(said)


def test_an_empty_optional_field_is_absent_but_for_a_full_record_of_mmedit(tmp_path: Path) -> None:
    item = one(tmp_path, PLAIN | {"rephrase": "", "loc": "", "loc_ans": "", "old_answer": ""})
    assert item.problem == "" and probe_texts(item.fields, item.task) == {}
    assert one(tmp_path, record(rephrase="")).problem == "empty field: field 'rephrase' is empty"


@pytest.mark.parametrize("image", [["a.png"], {"path": "a.png"}, {"path": "a.png", "bytes": None}, [{"path": "a.png"}]])
def test_a_picture_in_a_list_or_a_struct(tmp_path: Path, image: Any) -> None:
    assert one(tmp_path, PLAIN | {"image": image}).fields["image"] == "a.png"


def test_an_id_is_made_from_the_content(tmp_path: Path) -> None:
    values = [PLAIN, PLAIN | {"answer": "the North Gate"}, PLAIN | {"answer": "\u6a4b"}]
    ids = [item.edit_id for item in read(tmp_path / "a.jsonl", values)]
    assert [name[:-11] for name in ids] == ["a-dog", "the-north-gate", "edit"]
    sorted_again = {item.edit_id for item in read(tmp_path / "b.jsonl", [PLAIN | {"answer": "new"}, *values[::-1]])}
    assert set(ids) < sorted_again
    twice = [item.edit_id for item in read(tmp_path / "a.jsonl", [PLAIN, PLAIN, PLAIN])]
    assert twice == [ids[0], f"{ids[0]}-2", f"{ids[0]}-3"]
    full = read(tmp_path / "vqa_eval.jsonl", [record(0), record(1)])
    assert [item.edit_id for item in full] == ["vqa_eval-000000", "vqa_eval-000001"]


def file_bytes(digests: Digests) -> int:
    pages, size = (digests._ask(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * size)


@pytest.mark.parametrize("memory", [32, 2048])
def test_digests_are_a_set_in_memory_and_in_a_file(memory: int) -> None:
    rng, digests, names = random.Random(memory), Digests(memory), set[str]()
    for _ in range(12_000):
        name = f"name {rng.randrange(9000)}"
        assert (name in digests) == (name in names)
        assert digests.add(name) == (name not in names)
        names.add(name)
    assert (file_bytes(digests) > 2 * 1024 * memory) == (memory == 32)


def test_digests_without_room_say_so() -> None:
    digests = Digests()
    digests._ask("PRAGMA max_page_count = 4")
    with pytest.raises(StorageError, match=r"database or disk is full.*set SQLITE_TMPDIR"):
        for number in range(5000):
            digests.add(str(number))


def plain_ids(file: str, values: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """The id of each record and whether the one that it asks for is taken, by a set in memory."""
    seen: set[str] = set()
    ids = []
    for index, value in enumerate(values):
        wanted, numbers = value.get("edit_id"), itertools.count(2)
        is_taken = wanted in seen
        name = wanted or content_id(value["image"], value["question"], value["answer"])
        base = name
        if is_taken:
            base = name = f"{file}-{index:06d}"
        while name in seen:
            name = f"{name}a" if is_taken else f"{base}-{next(numbers)}"
        seen.add(name)
        ids.append((name, is_taken))
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_ids_are_those_of_a_set_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    own = [f"a-{number:06d}" for number in range(0, 400, 7)] + [f"own-{number}" for number in range(60)]
    values = [
        PLAIN | {"answer": f"dog {rng.randrange(150)}"} | ({"edit_id": rng.choice(own)} if rng.random() < 0.3 else {})
        for _ in range(600)
    ]
    monkeypatch.setattr(Digests.__init__, "__defaults__", (32,))
    found = [(item.edit_id, bool(item.problem)) for item in read(tmp_path / "a.jsonl", values)]
    assert found == plain_ids("a", values)
    assert len({name for name, _ in found}) == len(values)


def test_many_copies_of_a_record_are_numbered_in_order(tmp_path: Path) -> None:
    ids = [item.edit_id for item in read(tmp_path / "a.jsonl", [PLAIN] * 3000)]
    assert ids[1:] == [f"{ids[0]}-{number}" for number in range(2, 3001)]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (1000, 6000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("\n".join(json.dumps(PLAIN | {"answer": f"dog {number}"}) for number in range(count)))
        tracemalloc.start()
        assert sum(not item.problem for item in read_records(str(path))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 60_000  # the files hold 0.1 MB and 0.4 MB; the memory of SQLite is bounded by itself


def write_pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(number)))


@pytest.mark.parametrize("below", ["", "pictures", "data/pictures"])
def test_the_folder_of_the_pictures_is_found(tmp_path: Path, below: str) -> None:
    write_pictures(tmp_path / below, "x/a.png")
    path = write_array(tmp_path / "a.json", [PLAIN | {"image": "x/missing.png"}, PLAIN | {"image": "x/a.png"}])
    assert root_of(str(path), None, {}) == str(tmp_path / below).rstrip("/")
    assert root_of(str(path), "/given", {}) == "/given"


def test_without_any_picture_the_file_s_own_folder_is_named(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.json", [PLAIN])
    assert root_of(str(path), None, {}) == str(tmp_path)


def test_full_paths_need_a_root_and_are_read_under_it_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path, "in/a.png", "out/a.png")
    path = write_array(tmp_path / "a.json", [PLAIN | {"image": str(tmp_path / "in/a.png")}])
    with pytest.raises(InputError, match=r"data\.image_root: not set, and the records name pictures by full paths"):
        root_of(str(path), None, {})
    reader = ImageReader(str(tmp_path / "in"))
    assert reader.read(str(tmp_path / "in/a.png")).key == reader.read("a.png").key
    for outside in (tmp_path / "out/a.png", tmp_path / "in/../out/a.png"):
        with pytest.raises(ImageError) as caught:
            reader.read(str(outside))
        assert caught.value.kind == "forbidden path"


def test_a_pack_of_three_fields(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    report = pack(str(write_array(tmp_path / "a.json", [PLAIN])), None, None, str(tmp_path / "packed"))
    assert (report.num_records, report.num_problems, report.num_images) == (1, 0, 1)
    (item,) = read_records(str(tmp_path / "packed"))
    reader = ImageReader.for_records(str(tmp_path / "packed"))
    assert reader.read(item.fields["image"]).pixels.shape == (18, 24, 3)


def test_the_template_is_a_file_of_records(tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text(TEMPLATE)
    assert [item.problem for item in read_records(str(tmp_path / "records.csv"))] == ["", ""]
