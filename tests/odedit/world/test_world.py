"""Embedded world: accuracy thresholds of the shipped models, and properties of the benchmark."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odedit import world
from odedit.errors import InputError
from odedit.evaluation.columns import groups
from odedit.inputs.batch import SUPERVISION_SLOTS, check_probe_name, rephrase_slots
from odedit.world import benchmark, facts, images, questions

PARTS = ("train", "validation", "evaluation")
MMEDIT_KEYS = (
    "src", "pred", "alt", "rephrase", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(worlds: dict[int, dict[str, Path]]) -> dict[str, Path]:
    return worlds[1]


@pytest.fixture(scope="module")
def records(built: dict[str, Path]) -> dict[str, list[dict]]:
    return {part: json.loads(built[part].read_text(encoding="utf-8")) for part in PARTS}


def fact(record: dict) -> str:
    return record["edit_id"].split("-", 1)[1].rsplit("-", 1)[0]


def scored(record: dict) -> list[tuple[str, bytes | str]]:
    """Prompts and pictures that a record is scored on."""
    pairs = [
        (record["src"], record["image"]),
        (record["rephrase"], record["image"]),
        (record["src"], "rephrase root/" + record["image_rephrase"]),
        (record["loc"], ""),
        (record["m_loc_q"], record["m_loc"]),
    ]
    return pairs + [(probe["prompt"], probe.get("image", "")) for probe in record["probes"].values()]


def test_sizes(records):
    assert {part: len(records[part]) for part in PARTS} == {"train": 288, "validation": 144, "evaluation": 288}
    for part in PARTS:
        assert {record["task"] for record in records[part]} == {"vqa", "caption"}
        assert len({record["edit_id"] for record in records[part]}) == len(records[part])


def test_records_follow_mmedit(built, records):
    for record in (record for part in PARTS for record in records[part]):
        assert all(isinstance(record[key], str) and record[key] for key in MMEDIT_KEYS)
        assert (built["images"] / record["image"]).is_file()
        assert (built["images_rephrase"] / record["image_rephrase"]).is_file()
        assert (built["images"] / record["m_loc"]).is_file()
        for name, probe in record["probes"].items():
            check_probe_name(name)
            assert name not in groups()["locality"]
            assert "image" not in probe or (built["images"] / probe["image"]).is_file()
        assert set(record["held_out"]) == set(SUPERVISION_SLOTS[1:])
        for probe in record["held_out"].values():
            assert "image" not in probe or (built["images"] / probe["image"]).is_file()
        assert (record["src"] == "a photo of") == (record["task"] == "caption")


def test_facts_are_disjoint_between_files(records):
    by_part = [{fact(record) for record in records[part]} for part in PARTS]
    assert [len(part) for part in by_part] == [96, 48, 96]
    for one, other in combinations(by_part, 2):
        assert not one & other


def test_new_values_share_no_word_with_the_old(records):
    for record in (record for part in PARTS for record in records[part]):
        assert not set(record["alt"].split()) & set(record["pred"].split())


def test_supervision_is_never_scored(built, records):
    for record in (record for part in PARTS for record in records[part]):
        judged = set(scored(record))
        judged_pictures = {picture for _, picture in judged} - {""}
        for slot, probe in record["held_out"].items():
            assert (probe["prompt"], probe.get("image", "")) not in judged, (record["edit_id"], slot)
            if slot != "text_rephrase":  # it has the edit's own picture
                assert probe.get("image", "") not in judged_pictures
    pixels = {part: {} for part in ("scored", "supervision")}
    for record in records["evaluation"]:
        for root, path in (("images", record["image"]), ("images_rephrase", record["image_rephrase"])):
            pixels["scored"][(built[root] / path).read_bytes()] = path
        for probe in (record["held_out"][name] for name in ("image_rephrase", "image_locality", "near_locality")):
            pixels["supervision"][(built["images"] / probe["image"]).read_bytes()] = probe["image"]
    assert not pixels["scored"].keys() & pixels["supervision"].keys()


def test_no_entity_whose_answer_must_stay_is_supervised(records):
    """A hidden answer gives its entity away."""
    for record in (record for part in PARTS for record in records[part]):
        assert record["fact"] == f"{record['fact'].split(' of ')[0]} of {record['entity']}"
        stay = {record["loc_entity"], record["m_loc_entity"]}
        stay |= {record["probes"][name]["entity"] for name in ("m_loc_near", "t_loc_near")}
        assert record["entity"] not in stay and len(stay) == 3, "the country, the far and the near entity"
        attribute = record["fact"].split(" of ")[0]
        answer = record["held_out"]["near_locality"]["target"]
        (near,) = (entity for entity in facts.ENTITIES if facts.answer(entity, attribute) == answer)
        assert near.name not in stay
        asked = record["held_out"]["image_locality"]
        for name in stay - {record["loc_entity"]}:
            (entity,) = (entity for entity in facts.ENTITIES if entity.name == name)
            hidden = {facts.answer(entity, attribute) for attribute in facts.HIDDEN}
            assert asked["target"] not in hidden
        assert record["held_out"]["text_locality"]["prompt"].find(record["loc_entity"]) == -1
        assert all(not {"fact", "entity"} & entry.keys() for entry in record["held_out"].values())


def test_as_many_rephrases_as_asked_beside_the_same_records(built, tmp_path: Path, monkeypatch):
    """Each has a wording and a picture of its own; everything else is that of a single rephrase."""
    monkeypatch.setattr(benchmark, "FACTS_PER_ATTRIBUTE", {"train": 1, "validation": 1, "evaluation": 1})
    one, five = (world.build(tmp_path / str(count), 3, count) for count in (1, 5))
    trained = {
        questions.ask(attribute, cell, subject)
        for attribute in facts.ATTRIBUTES
        for cell in questions.cells(attribute, held_out=False)
        for subject in questions.SUBJECTS
    }
    for part in PARTS:
        for alone, several in zip(*(json.loads(paths[part].read_text()) for paths in (one, five)), strict=True):
            held_out = several.pop("held_out")
            assert {slot: held_out[slot] for slot in SUPERVISION_SLOTS[1:]} == alone.pop("held_out")
            assert several == alone
            assert held_out.keys() == {*SUPERVISION_SLOTS[1:], *rephrase_slots(5)}
            texts = [held_out[slot] for slot in rephrase_slots(5)[::2]]
            pictures = [held_out[slot] for slot in rephrase_slots(5)[1::2]]
            prompts = {text["prompt"] for text in texts}
            assert len(prompts) == 5 and prompts < trained and several["src"] not in prompts
            assert {text["image"] for text in texts} == {several["image"]}
            seen = {(five["images"] / picture["image"]).read_bytes() for picture in pictures}
            assert len(seen) == 5 and {picture["prompt"] for picture in pictures} == {several["src"]}
            assert {entry["target"] for entry in (*texts, *pictures)} == {several["alt"]}
    with pytest.raises(InputError, match="supervision.rephrases: got 24, but the embedded benchmark has 1 to 23"):
        world.build(tmp_path / "many", 0, 24)


def test_rephrases_are_held_out_cells(records):
    trained = {
        questions.ask(attribute, cell, subject)
        for attribute in facts.ATTRIBUTES
        for cell in questions.cells(attribute, held_out=False)
        for subject in questions.SUBJECTS
    }
    for record in (record for part in PARTS for record in records[part]):
        assert record["src"] in trained
        assert record["rephrase"] not in trained
        assert record["probes"]["tm_gen"]["prompt"] not in {*trained, record["rephrase"]}
        assert record["held_out"]["text_rephrase"]["prompt"] in trained - {record["src"]}


def test_build_is_deterministic(built, tmp_path: Path):
    again = world.build(tmp_path / "again", seed=1)
    for part in PARTS:
        assert built[part].read_bytes() == again[part].read_bytes()
    for root in ("images", "images_rephrase"):
        files = sorted(path.relative_to(built[root]) for path in built[root].rglob("*.png"))
        assert files == sorted(path.relative_to(again[root]) for path in again[root].rglob("*.png"))
        for file in files[::97]:
            assert (built[root] / file).read_bytes() == (again[root] / file).read_bytes()


def test_another_seed_draws_other_edits_of_the_same_facts(built, worlds):
    """Training facts of one seed must not be evaluation facts of another."""
    other = worlds[0]
    one, two = ({r["edit_id"]: r for r in json.loads(p["evaluation"].read_text())} for p in (built, other))
    assert one.keys() == two.keys() and len(one) == 288
    assert sum(one[key]["alt"] != two[key]["alt"] for key in one) > 200
    assert (built["images"] / one[key := min(one)]["image"]).read_bytes() != (
        other["images"] / two[key]["image"]
    ).read_bytes()


def test_build_into_a_file_is_refused(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="expected a directory"):
        world.build(tmp_path / "taken")


def test_handwriting_is_divided():
    writing = images.handwriting()
    for digit in range(10):
        shares = [writing.training[digit], *(writing.held_out[part][digit] for part in PARTS)]
        for one, other in combinations(shares, 2):
            assert not set(one) & set(other)
        assert min(len(share) for share in shares) >= 8


def test_answers_are_unique_pairs():
    for attribute in facts.HIDDEN:
        answers = {facts.answer(entity, attribute) for entity in facts.ENTITIES}
        assert len(answers) == len(facts.ENTITIES)


def test_every_noun_and_frame_is_trained():
    for attribute in facts.ATTRIBUTES:
        trained = questions.cells(attribute, held_out=False)
        assert {cell.frame for cell in trained} == set(range(len(questions.frames(attribute))))
        assert len({cell.noun for cell in trained}) == 4
        assert len(trained) == 3 * len(questions.cells(attribute, held_out=True))


def content(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.*")):
        digest.update(str(path.relative_to(folder)).encode())
        # Pixels, because another version of the PNG encoder may write other bytes.
        digest.update(np.asarray(Image.open(path)).tobytes() if path.suffix == ".png" else path.read_bytes())
    return digest.hexdigest()[:16]


def test_other_content_needs_another_version_of_the_benchmark(worlds):
    drawn = {seed: content(paths["train"].parent) for seed, paths in worlds.items()}
    assert (world.BENCHMARK_VERSION, drawn) == ("c56f86e5", {0: "c56f86e55bb264ea", 1: "7d2def8fbb0c79e8"})


def test_importing_the_world_is_light():
    code = "import sys, odedit.world; print([m for m in ('transformers', 'sklearn', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def in_world(number: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ODEDIT_WORLD": number}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_another_world_has_other_names_facts_and_handwriting():
    code = (
        "import json; from odedit.world import facts, images, checkpoint_path; from odedit.errors import InputError\n"
        "try: checkpoint_path()\n"
        "except InputError as error: message = str(error)\n"
        "hidden = {a: [facts.answer(e, a) for e in facts.ENTITIES] for a in facts.HIDDEN}\n"
        "training = [x.tolist() for x in images.handwriting().training]\n"
        "print(json.dumps([hidden, list(facts.COUNTRIES), training, message]))"
    )
    (hidden, countries, training, message), (third, *_) = (json.loads(in_world(n, code).stdout) for n in ("1", "2"))
    assert message == (
        "backbone.checkpoint: got 'embedded', but the models that ship know world 0, and ODEDIT_WORLD is 1. "
        "Train one with: odedit world train FOLDER."
    )
    for attribute, answers in hidden.items():
        words = {word for answer in answers for word in answer.split()}
        assert not words & {word for e in facts.ENTITIES for word in facts.answer(e, attribute).split()}
        assert len(set(answers)) == len(facts.ENTITIES)
        assert answers != third[attribute] and words == {word for answer in third[attribute] for word in answer.split()}
    assert set(countries) != set(facts.COUNTRIES)
    assert training[0] != images.handwriting().training[0].tolist()


def test_a_world_is_a_number():
    done = in_world("other", "import odedit.world")
    assert "ODEDIT_WORLD: got 'other', expected a number" in done.stderr
