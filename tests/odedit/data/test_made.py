"""Supervision that is made: general questions, records about pictures, and augmented pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from odedit.data.images import ImageReader
from odedit.data.made import (
    ABOUT_A_PICTURE,
    GENERAL,
    about_pictures,
    completed,
    general_question,
    own_pictures,
    pictures_in,
)
from odedit.data.origins import NEGATIVES, Wanted, counted, origins
from odedit.data.pool import Pool, normal
from odedit.data.records import RawRecord, read_records
from odedit.data.rewording import Augmentation, base_key, blend_noise, may_mirror, seeded
from odedit.data.supervision import Supervision, build_request
from odedit.errors import InputError
from odedit.inputs.batch import SUPERVISION_SLOTS, Picture
from odedit.storage.location import locate
from tests.support.mmedit_files import encoded, picture, record, write_array

COUNT = 4


@pytest.fixture
def records(tmp_path: Path) -> list[RawRecord]:
    """Records of three fields, with one question for all."""
    for number in range(COUNT):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
    fields = [
        {"image": f"{number}.png", "question": "what is it?", "answer": f"dog {number}"} for number in range(COUNT)
    ]
    return list(read_records(str(write_array(tmp_path / "a.json", fields))))


def own_pool(records: list[RawRecord], folder: Path) -> Pool:
    return Pool(about_pictures(own_pictures(records), "the records' pictures"), ImageReader(str(folder)), is_made=True)


def test_three_fields_are_supervised_from_the_records_own_pictures(records: list[RawRecord], tmp_path: Path) -> None:
    reader = ImageReader(str(tmp_path))
    requests = [build_request(item, reader, Supervision(), own_pool(records, tmp_path)) for item in records]
    for request in requests:
        assert set(request.supervision) == set(SUPERVISION_SLOTS[1:]) and request.probes == {}
        assert request.replaced is None
        near, image = request.supervision["near_locality"], request.supervision["image_locality"]
        assert near.prompt == "what is it?" and near.picture is not None and image.picture is not None
        assert near.picture.key == image.picture.key != request.edit.picture.key
        assert (image.prompt, image.target) in ABOUT_A_PICTURE
        assert (request.supervision["text_locality"].prompt, request.supervision["text_locality"].target) in GENERAL
        assert request.supervision["image_rephrase"].target == request.edit.target
        assert base_key(request.supervision["image_rephrase"].picture.key) == request.edit.picture.key


def test_a_single_record_has_no_other_picture(records: list[RawRecord], tmp_path: Path) -> None:
    request = build_request(
        records[0], ImageReader(str(tmp_path)), Supervision(), own_pool(records[:1], tmp_path)
    )  # fmt: skip
    assert set(request.supervision) == {"text_rephrase", "image_rephrase", "text_locality"}


def test_record_sources_are_the_scored_probes_that_a_record_has(records: list[RawRecord], tmp_path: Path) -> None:
    item = RawRecord("a", 0, "a-0", "vqa", {**records[0].fields, "rephrase": "name it", "loc": "who?", "loc_ans": "me"})
    supervision = Supervision(rephrase_source="record", locality_source="record")
    request = build_request(item, ImageReader(str(tmp_path)), supervision, own_pool(records, tmp_path))
    assert request.supervision["text_rephrase"] is request.probes["t_gen"]
    assert request.supervision["text_locality"] is request.probes["t_loc"]
    assert set(request.supervision) == set(SUPERVISION_SLOTS[1:])


def test_a_pool_of_three_fields_is_completed(records: list[RawRecord], tmp_path: Path) -> None:
    pool = Pool.sample(str(tmp_path / "a.json"), ImageReader(str(tmp_path)))
    assert len(pool.records) == COUNT and not pool.is_made
    for item in pool.records:
        assert (item.fields["loc"], item.fields["loc_ans"]) in GENERAL and item.fields["m_loc"] == item.fields["image"]
    full = RawRecord("a", 0, "a-0", "vqa", record())
    assert completed(full) is full


def test_questions_that_are_scored_are_not_taken() -> None:
    asked = {normal(question) for question, _ in GENERAL[1:]}
    assert {general_question(str(number), 0, asked) for number in range(20)} == {GENERAL[0]}
    assert len({general_question(str(number), 0) for number in range(60)}) > 10
    assert general_question("a", 3) == general_question("a", 3)
    assert len({normal(question) for question, _ in GENERAL}) == len(GENERAL)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "deep/er/a.jpg", "c.txt", "d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert pictures_in(locate(str(tmp_path), "data.pictures"), 9) == ["b.PNG", "d.png", "deep/er/a.jpg"]
    drawn = [tuple(pictures_in(locate(str(tmp_path), "data.pictures"), 2, seed)) for seed in range(9)]
    assert len(set(drawn)) > 1 and drawn[0] == tuple(pictures_in(locate(str(tmp_path), "data.pictures"), 2, 0))
    (tmp_path / "none").mkdir()
    for folder, said in (("none", "holds no picture"), ("missing", "cannot be read")):
        with pytest.raises(InputError, match=said):
            pictures_in(locate(str(tmp_path / folder), "data.pictures"), 2)


def drawn(count: int, *, mirror: bool) -> list[Augmentation]:
    return [Augmentation.drawn(seeded(str(number), "image"), may_mirror=mirror) for number in range(count)]


def test_augmentations_are_seeded_and_say_what_they_do() -> None:
    original = Picture("k" * 32, np.asarray(picture(1, (40, 30))))
    first, again = drawn(30, mirror=True), drawn(30, mirror=True)
    assert first == again
    for kind in ("mirrored", "blurred", "on a background"):
        assert 0 < sum(kind in str(one) for one in first) < len(first)
    assert not any("mirrored" in str(one) for one in drawn(30, mirror=False))
    made = [one.of(original) for one in first]
    assert len({one.key for one in made}) == 30 and {one.pixels.shape for one in made} == {(30, 40, 3)}
    assert {base_key(one.key) for one in made} == {original.key}
    for changed in made:
        assert not np.array_equal(changed.pixels, original.pixels)


@pytest.mark.parametrize("share", [1e-05, 0.3, 1.0])
def test_the_key_of_a_noisy_picture_tells_the_picture_that_it_is_made_of(share: float) -> None:
    original = Picture("0" * 32, np.asarray(picture(1, (40, 30))))
    for seen in (original, drawn(1, mirror=True)[0].of(original)):
        assert base_key(blend_noise(seen, share, seeded("edit", "noise")).key) == original.key


@pytest.mark.parametrize(
    ("texts", "may"),
    [
        (("what is this bridge called?", "the North Gate"), True),
        (("which hand is on the LEFT?", "the right one"), False),
        (("what does the sign say?", "stop"), False),
        (("who owns this digit?", "Anna"), False),
        (("how many dogs are there?", "3"), False),
    ],
)
def test_a_picture_is_mirrored_where_its_answer_stays_right(texts: tuple[str, str], may: bool) -> None:
    assert may_mirror(*texts) == may


def test_every_supervision_has_an_origin(records: list[RawRecord]) -> None:
    slots = {*SUPERVISION_SLOTS, NEGATIVES}
    own = origins(records[0], Supervision(), Wanted(slots, "the records' pictures", True, COUNT))
    assert own.given == own.drawn == own.missing == ()
    assert list(own.made) == [*SUPERVISION_SLOTS[1:], NEGATIVES, "old_answer"]
    assert own.made["image_rephrase"].startswith("turned ") and "text_rephrase: a built-in" in own.made_text()
    alone = origins(records[0], Supervision(near_locality=False), Wanted(slots, "the records' pictures", True, 1))
    assert alone.missing == ("image_locality", NEGATIVES)
    full = RawRecord("a", 0, "a-0", "vqa", record())
    pooled = origins(full, Supervision(rephrase_source="record"), Wanted(slots, "data.pool"))
    assert pooled.given == ("text_rephrase", "image_rephrase", "old_answer") and pooled.made == {}
    assert pooled.drawn == ("text_locality", "image_locality", "near_locality", NEGATIVES)
    assert origins(full, Supervision(), Wanted({"edit"})).made == {}
    counts = counted([*records, full], Supervision(), Wanted({"text_rephrase"}))
    assert json.loads(json.dumps(counts)) == {"text_rephrase": {"made": 5}}
