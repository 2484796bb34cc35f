import json
import os
import subprocess
import sys

import numpy as np
import pytest

from odedit.data.fields import CAPTION_PROMPT
from odedit.data.images import ImageError, ImageReader
from odedit.data.pool import Pool
from odedit.data.records import RawRecord, read_records
from odedit.data.rewording import CAPTION_WORDINGS, QUESTION_WORDINGS, augment, reword, seeded
from odedit.data.supervision import Supervision, build_request, rephrase_distance
from odedit.errors import InputError
from odedit.inputs.batch import SUPERVISION_SLOTS, EditRequest, Picture, Probe, rephrase_slots
from tests.support.mmedit_files import caption, encoded, picture, record, write_array, write_images

LOCALITY = ("text_locality", "image_locality", "near_locality")


class Files:
    """Evaluation file and training file with their images."""

    def __init__(self, folder, evaluated, train=()):
        image_root, rephrase_root = write_images(folder, [*evaluated, *train])
        self.root = image_root
        self.reader = ImageReader(str(image_root), str(rephrase_root))
        self.records = list(read_records(str(write_array(folder / "vqa_eval.json", evaluated))))
        self.pool = None
        if train:
            self.pool = Pool.sample(str(write_array(folder / "vqa_train.json", list(train))), self.reader)

    def request(self, index=0, **settings):
        return build_request(self.records[index], self.reader, Supervision(**settings), self.pool)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path, [record(0), record(1)], [record(number) for number in range(10, 14)])


def test_the_edit_and_its_probes(files):
    request = files.request()
    assert (request.edit_id, request.task) == ("vqa_eval-000000", "vqa")
    assert (request.edit.prompt, request.edit.target) == ("What is object 0?", "dog 0")
    assert list(request.probes) == ["t_gen", "m_gen", "t_loc", "m_loc"]
    np.testing.assert_array_equal(request.probes["m_gen"].picture.pixels, np.asarray(picture(2)))
    assert request.probes["t_gen"].picture is request.edit.picture
    assert request.probes["t_loc"].picture is None
    assert request.meta["file"] == "vqa_eval.json" and request.meta["index"] == "0"


def test_record_sources_are_the_scored_probes(files):
    request = files.request(rephrase_source="record", locality_source="record")
    pairs = {"text_rephrase": "t_gen", "image_rephrase": "m_gen", "text_locality": "t_loc", "image_locality": "m_loc"}
    for slot, probe in pairs.items():
        assert request.supervision[slot] is request.probes[probe]
    near = request.supervision["near_locality"]
    assert near.prompt == request.edit.prompt and near.picture is request.probes["m_loc"].picture
    assert "pool_record" not in request.meta


def test_as_many_rephrases_as_asked_those_of_the_record_first(tmp_path):
    own = {"text_rephrase_2": {"prompt": "Name object 0.", "target": "dog 0", "image": record(0)["image"]}}
    files = Files(tmp_path, [record(0) | {"held_out": own}], [record(number) for number in range(10, 14)])
    one, four = files.request(), files.request(rephrases=4)
    assert four.num_rephrases == 4 and set(four.supervision) == {*SUPERVISION_SLOTS, *rephrase_slots(4)} - {"edit"}
    assert all(four.supervision[slot].prompt == probe.prompt for slot, probe in one.supervision.items())
    texts = [four.supervision[f"text_rephrase{n}"].prompt for n in ("", "_2", "_3", "_4")]
    assert texts[1] == "Name object 0." and len(set(texts)) == 4
    pictures = {four.supervision[f"image_rephrase{n}"].picture.key for n in ("", "_2", "_3", "_4")}
    assert len(pictures) == 4 and not pictures & {p.picture.key for p in four.probes.values() if p.picture}
    noisy = files.request(rephrases=4, rephrase_noise=0.5)
    assert all(noisy.supervision[slot].prompt != four.supervision[slot].prompt for slot in rephrase_slots(4)[::2])


def test_a_question_has_no_more_text_rephrases_than_wordings(tmp_path):
    files = Files(tmp_path, [record(0)], [record(number) for number in range(10, 14)])
    built_in = len(QUESTION_WORDINGS)
    many = files.request(rephrases=built_in + 3)
    assert {f"text_rephrase_{number}" for number in (built_in, built_in + 1)} & set(many.supervision) == {
        f"text_rephrase_{built_in}"
    }
    assert many.num_rephrases == built_in + 3 and many.rephrase(built_in + 3).prompt == many.edit.prompt


def test_further_rephrases_of_a_scored_one_are_made(tmp_path):
    files = Files(tmp_path, [record(0)], [record(number) for number in range(10, 14)])
    request = files.request(rephrases=2, rephrase_source="record")
    assert request.supervision["text_rephrase"].prompt == request.probes["t_gen"].prompt
    assert len({request.supervision[slot].prompt for slot in ("text_rephrase", "text_rephrase_2")}) == 2


def test_a_thing_whose_answer_is_scored_does_not_supervise(tmp_path):
    """By entity or by fact, where both records name it."""
    train = [record(number) | {"entity": f"thing {number}", "fact": f"fact {number}"} for number in range(10, 14)]
    train[3] = {key: value for key, value in train[3].items() if key not in ("entity", "fact")}
    near = {"prompt": "What is object 0?", "target": "x", "image": record(1)["image"], "entity": "thing 10"}
    scored = record(0) | {"probes": {"m_loc_near": near}, "m_loc_fact": "fact 12"}
    files = Files(tmp_path, [scored, record(1)], train)
    reasons = files.pool.left_out(files.records[0])
    assert reasons == {"a scored fact or entity": 2}
    drawn = {files.request(seed=seed).meta["pool_record"] for seed in range(20)}
    assert drawn == {files.pool.records[n].edit_id for n in range(4) if files.pool.records[n].fields["src"] in
                     ("What is object 11?", "What is object 13?")}  # fmt: skip
    assert len({files.request(1, seed=seed).meta["pool_record"] for seed in range(30)}) == 4


def test_held_out_supervision_shares_nothing_with_what_is_scored(files):
    request = files.request()
    assert set(request.supervision) == set(SUPERVISION_SLOTS[1:])
    scored = [request.edit, *request.probes.values()]
    keys = {probe.picture.key for probe in scored if probe.picture}
    prompts = {probe.prompt for probe in scored}
    for slot, probe in request.supervision.items():
        if slot not in ("near_locality", "image_rephrase"):
            assert probe.prompt not in prompts, slot
        if slot != "text_rephrase":
            assert probe.picture is None or probe.picture.key not in keys, slot
    drawn = next(item for item in files.pool.records if item.edit_id == request.meta["pool_record"])
    assert request.supervision["text_locality"].prompt == drawn.fields["loc"]
    assert request.supervision["image_locality"].prompt == drawn.fields["m_loc_q"]
    near = request.supervision["near_locality"]
    assert (near.prompt, near.target) == (request.edit.prompt, drawn.fields["pred"])
    assert near.picture.key == files.reader.read(drawn.fields["image"]).key
    assert "near_locality" not in files.request(near_locality=False).supervision


def test_rephrases_are_made_from_the_edit(files):
    request = files.request()
    text, image = request.supervision["text_rephrase"], request.supervision["image_rephrase"]
    assert request.edit.prompt in text.prompt and text.prompt != request.edit.prompt
    assert text.picture is request.edit.picture and text.target == image.target == "dog 0"
    assert image.prompt == request.edit.prompt
    assert image.picture.key.startswith(request.edit.picture.key + "-")
    assert not np.array_equal(image.picture.pixels, request.edit.picture.pixels)


def summary(request):
    return {slot: (probe.prompt, probe.picture and probe.picture.key) for slot, probe in request.supervision.items()}


def test_the_same_record_gives_the_same_request(files):
    assert summary(files.request()) == summary(files.request())
    assert summary(files.request(0)) != summary(files.request(1))
    assert len({json.dumps(summary(files.request(seed=seed))) for seed in range(5)}) == 5


def test_draws_do_not_depend_on_the_process():
    code = "from odedit.data.rewording import seeded; print(seeded('a-1', 'text', 3).random())"
    values = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert values == {f"{seeded('a-1', 'text', 3).random()}\n".encode()}


def test_own_held_out_entries_come_first(tmp_path):
    probe = {"prompt": "own question", "target": "own answer"}
    fields = record(0)
    with_image = probe | {"image": fields["m_loc"]}
    fields["held_out"] = {
        "text_rephrase": with_image,
        "image_rephrase": probe | {"image": "rephrase:" + fields["image_rephrase"]},
        "text_locality": probe,
        "image_locality": with_image,
        "near_locality": with_image,
    }
    request = Files(tmp_path, [fields]).request()
    assert {item.prompt for item in request.supervision.values()} == {"own question"}
    assert set(request.supervision) == set(SUPERVISION_SLOTS[1:])
    assert request.supervision["image_rephrase"].picture is not None


def test_near_locality_from_the_own_held_out_image(tmp_path):
    fields = record(0)
    probe = {"prompt": "q", "target": "held out answer"}
    fields["held_out"] = {"text_locality": probe, "image_locality": probe | {"image": fields["m_loc"]}}
    near = Files(tmp_path, [fields]).request().supervision["near_locality"]
    assert (near.prompt, near.target) == (fields["src"], "held out answer")


def test_no_pool(tmp_path):
    files = Files(tmp_path, [record(0)])
    with pytest.raises(InputError, match=r"vqa_eval.json, record 0: .*text_locality.*Set data.pool"):
        files.request()
    assert set(files.request(locality_source="record").supervision) == set(SUPERVISION_SLOTS[1:])


@pytest.mark.parametrize(
    "shared",
    [
        {"image": record(0)["image"]},
        {"m_loc": record(0)["image"]},
        {"image": record(0)["m_loc"]},
        {"image_rephrase": record(0)["image_rephrase"]},
        {"loc": "WHO wrote  book 0"},
    ],
)
def test_pool_records_that_share_something_are_left_out(tmp_path, shared):
    files = Files(tmp_path, [record(0)], [record(9, **shared)])
    with pytest.raises(InputError, match="none of its 1 records can supervise vqa_eval-000000"):
        files.request()


def test_pool_records_with_the_same_image_question_come_last(tmp_path):
    files = Files(tmp_path, [record(0)], [record(8, m_loc_q=record(0)["m_loc_q"]), record(9)])
    assert {files.request(seed=seed).meta["pool_record"] for seed in range(8)} == {"vqa_train-000001"}
    pool = Pool(files.pool.records[:1], files.reader)
    request = build_request(files.records[0], files.reader, Supervision(), pool)
    assert request.meta["pool_record"] == "vqa_train-000000"


def test_pool_of_the_same_file_leaves_out_the_record_itself(tmp_path):
    files = Files(tmp_path, [record(0), record(1)])
    pool = Pool(files.records, files.reader)
    for item, other in ((0, 1), (1, 0)):
        request = build_request(files.records[item], files.reader, Supervision(), pool)
        assert request.meta["pool_record"] == files.records[other].edit_id


def test_pool_images_with_equal_content_or_damage_are_left_out(tmp_path):
    files = Files(tmp_path, [record(0)], [record(10), record(11), record(12)])
    (files.root / record(10)["image"]).write_bytes((files.root / record(0)["image"]).read_bytes())
    (files.root / record(11)["m_loc"]).write_bytes(b"broken")
    for seed in range(8):
        assert files.request(seed=seed).meta["pool_record"] == "vqa_train-000002"
    (files.root / record(12)["m_loc"]).unlink()
    with pytest.raises(InputError, match="Use a larger pool"):
        files.request()


def test_unreadable_image_of_the_record(files):
    (files.root / record(0)["m_loc"]).unlink()
    with pytest.raises(ImageError, match=r"COCO_val2014_000000900000.jpg' is not under"):
        files.request()
    assert files.request(1).edit_id == "vqa_eval-000001"


def test_record_with_a_problem(files):
    with pytest.raises(ValueError, match="not an edit"):
        build_request(RawRecord("a", 0, "a-0", "vqa", {}, "not an edit: x"), files.reader, Supervision(), None)


@pytest.mark.parametrize("name", ["rephrase_source", "locality_source"])
def test_unknown_source(name):
    message = f"{name}: got 'records', expected 'held_out' or 'record'. Did you mean 'record'"
    with pytest.raises(ValueError, match=message):
        Supervision(**{name: "records"})


def test_sampling_a_pool(tmp_path):
    fields = [record(number) for number in range(60)] + [record(99, alt="")]
    path = str(write_array(tmp_path / "vqa_train.json", fields))
    reader = ImageReader(str(tmp_path))
    counts = np.zeros(60)
    for seed in range(300):
        pool = Pool.sample(path, reader, size=6, seed=seed)
        chosen = [item.index for item in pool.records]
        assert len(set(chosen)) == 6
        counts[chosen] += 1
    # Each record is drawn with chance 0.1: 30 of 300, standard deviation 5.2.
    assert counts.min() > 8 and counts.max() < 55
    assert Pool.sample(path, reader, size=6, seed=1).records == Pool.sample(path, reader, size=6, seed=1).records
    assert len(Pool.sample(path, reader).records) == 60
    with pytest.raises(InputError, match="size of the pool: got 0"):
        Pool.sample(path, reader, size=0)
    empty = str(write_array(tmp_path / "empty.json", [record(0, alt="")]))
    with pytest.raises(InputError, match="has no usable record"):
        Pool.sample(empty, reader)


def test_caption_rewordings_avoid_the_scored_ones(tmp_path):
    for number, rephrase in enumerate(CAPTION_WORDINGS):
        words = {reword(CAPTION_PROMPT, "caption", seeded(str(seed), "x"), {rephrase}) for seed in range(80)}
        assert words == set(CAPTION_WORDINGS) - {rephrase}
        folder = tmp_path / str(number)
        folder.mkdir()
        files = Files(folder, [caption(0, rephrase=f" {rephrase.title()}")], [caption(1)])
        assert files.request().supervision["text_rephrase"].prompt != rephrase
        assert files.records[0].task == "caption"


def test_which_prompts_begin_a_caption(tmp_path):
    probe = {"prompt": "What is this?", "target": "x"}
    beginning = {"prompt": CAPTION_PROMPT, "target": "x"}
    extra = {"far_gen": probe | {"prompt": "a drawing of"}, "t_loc_near": probe, "m_loc_near": beginning}
    train = [record(1), caption(2)]
    request = Files(tmp_path, [caption(0, probes=extra, held_out={"near_locality": beginning})], train).request()
    captions = {name for name, probe in (request.probes | request.supervision).items() if probe.is_caption}
    assert request.edit.is_caption
    assert captions == {"t_gen", "m_gen", "far_gen", "m_loc_near", "text_rephrase", "image_rephrase", "near_locality"}
    (tmp_path / "vqa").mkdir()
    request = Files(tmp_path / "vqa", [record(0)], [caption(1)]).request()
    assert not any(probe.is_caption for probe in [request.edit, *(request.probes | request.supervision).values()])


def test_question_rewordings_hold_the_question():
    words = {reword("Is it {red}?", "vqa", seeded(str(seed), "x")) for seed in range(80)}
    assert len(words) == len(QUESTION_WORDINGS) and all("Is it {red}?" in text for text in words)
    others = {reword("The scene:", "caption", seeded(str(seed), "x")) for seed in range(40)}
    assert len(others) == 3 and all("The scene:" in text for text in others)


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (64, 48), (224, 224)])
def test_augmented_pictures(shape):
    original = Picture("k", np.full((*shape, 3), 100, np.uint8))
    for seed in range(20):
        changed = augment(original, seeded(str(seed), "x"))
        assert changed.pixels.shape == original.pixels.shape and changed.pixels.dtype == np.uint8
        # No border is filled: a uniformly grey picture stays uniform.
        assert changed.pixels.min() == changed.pixels.max() != 100
        assert 79 <= changed.pixels.min() <= 121
    assert original.pixels.min() == original.pixels.max() == 100


def test_augmented_picture_shows_the_same_scene():
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40] = 100
    for seed in range(20):
        changed = augment(Picture("k", pixels), seeded(str(seed), "x")).pixels
        assert changed[:, :25].mean() > 70 and changed[:, 55:].mean() < 10


def test_pool_reader_has_its_own_roots(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    evaluated = Files(tmp_path / "a", [record(0)])
    other = Files(tmp_path / "b", [record(5), record(6)])
    (other.root / record(6)["image"]).write_bytes(encoded(picture(77)))
    pool = Pool(other.records[1:], other.reader)
    near = build_request(evaluated.records[0], evaluated.reader, Supervision(), pool).supervision["near_locality"]
    np.testing.assert_array_equal(near.picture.pixels, np.asarray(picture(77)))


@pytest.mark.parametrize("source", ["held_out", "record"])
def test_noise_on_rephrases_has_the_strength_asked_for_and_spares_what_is_scored(files, source):
    plain = files.request(rephrase_source=source)
    noisy = files.request(rephrase_source=source, rephrase_noise=0.5)
    for slot in LOCALITY:
        assert summary(noisy)[slot] == summary(plain)[slot]
    assert (noisy.edit.prompt, noisy.edit.picture.key) == (plain.edit.prompt, plain.edit.picture.key)
    for name, probe in plain.probes.items():
        assert noisy.probes[name].prompt == probe.prompt
        if probe.picture is not None:
            np.testing.assert_array_equal(noisy.probes[name].picture.pixels, probe.picture.pixels)

    before, after = (request.supervision["text_rephrase"].prompt.split() for request in (plain, noisy))
    assert sum(old != new for old, new in zip(before, after, strict=True)) == round(len(before) / 2)
    pool_words = {word for other in files.pool.records for word in other.fields["src"].split()}
    assert set(after) - set(before) <= pool_words
    old, new = (request.supervision["image_rephrase"].picture for request in (plain, noisy))
    assert new.key != old.key
    # With a share of .5, a pixel changes by at most 128, and the mean is half way to that of the noise.
    difference = new.pixels.astype(float) - old.pixels
    assert np.abs(difference).max() <= 128
    assert new.pixels.mean() == pytest.approx((old.pixels.mean() + 127.5) / 2, abs=3)


def test_noise_is_a_function_of_the_edit_and_its_strength(files):
    assert summary(files.request(rephrase_noise=0.5)) == summary(files.request(rephrase_noise=0.5))
    assert summary(files.request(rephrase_noise=0.0)) == summary(files.request())
    keys = {files.request(rephrase_noise=share).supervision["image_rephrase"].picture.key for share in (0.1, 0.2, 0.3)}
    assert len(keys) == 3
    with pytest.raises(ValueError, match=r"rephrase_noise: got 1\.5"):
        Supervision(rephrase_noise=1.5)


def test_pure_noise_keeps_no_word_and_no_pixel_of_the_rephrase(tmp_path):
    request = Files(tmp_path, [record(0)]).request(locality_source="record", rephrase_noise=1.0)
    plain = Files(tmp_path, [record(0)]).request(locality_source="record")
    words = [set(item.supervision["text_rephrase"].prompt.split()) for item in (request, plain)]
    assert not words[0] & words[1]
    pixels = [item.supervision["image_rephrase"].picture.pixels for item in (request, plain)]
    assert np.mean(pixels[0] == pixels[1]) < 0.02


def test_distance_of_the_text_rephrase():
    def distance(prompt, rephrase):
        return rephrase_distance(EditRequest("e", Probe(prompt, "a"), {"text_rephrase": Probe(rephrase, "a")}))

    assert distance("Who owns this?", "who owns THIS") == 0
    assert distance("who owns this", "a b") == 1
    assert distance("who owns this digit", "this digit is whose digit") == 1 - 2 / 6
    assert distance("?", "!") is None
    assert rephrase_distance(EditRequest("e", Probe("q", "a"))) is None
