"""Published benchmarks: each small file has the keys of the published one, and becomes records with probes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from odedit.data.check import CheckReport, check_records
from odedit.data.fields import ProbeText, probe_texts
from odedit.data.layouts import layout_of
from odedit.data.records import RawRecord, read_records
from tests.support.mmedit_files import record

MMEDIT = record()
ANSWERED = {"Question": "in which country is it?", "Answer": "Norland"}
HOPS = [{"port_type": "1-hop", "Q&A": ANSWERED}, {"port_type": "2-hop", "Q&A": ANSWERED | {"Answer": "Anna"}}]
VLKEB = MMEDIT | {"port_new": HOPS}
CCKEB = MMEDIT | {
    "port_new": [{"port_type": "comp", "Q&A": ANSWERED}],
    "textual_edit": {"src": "who rules Norland?", "pred": ["A"], "alt": ["B"], "rephrase": "?", "loc": "?"},
}
MMKE_ENTITY = MMEDIT | {
    "knowledge_type": "entity_level",
    "rel_1": "who made it?", "rel_ans_1": "Anna", "rel_2": "when?", "rel_2_ans": "in 1990",
    "m_rel_1": "who made this?", "m_rel_ans_1": "Anna", "m_rel_2": "when was this made?", "m_rel_2_ans": "in 1990",
    "port_new": HOPS[:1],
}  # fmt: skip
MMKE_VISUAL = MMEDIT | {
    "knowledge_type": "visual_knowledge", "rel": "what does it mean?", "rel_ans": "stop", "m_rel": "what is meant?",
    "m_rel_ans": "stop", "image_rephrase_question": "what is meant here?", "one_hop_img": "hop.jpg",
    "port_new": HOPS[:1],
}  # fmt: skip
COMPREHEND = {
    "pid": 3, "image": "GQA/images/1.jpg", "question": "what is this bird called?", "rephrase": "the bird's name?",
    "answer": "parrot", "source": "GQA", "Category": "object recognition", "img_topk": [1, 2],
    "locality_prompt": "when does it come out", "locality_ground_truth": "1999", "multimodal_locality_image": "2.jpg",
    "multimodal_locality_prompt": "what colour is it?", "multimodal_locality_ground_truth": "red",
}  # fmt: skip
MC_MKE_ENTITY = {
    "relation": "capital", "e_ent": "Norland", "ie_edit_input_idx": 0, "new_e_ent": "Sudland",
    "ie_question": "which country is it?", "ie_cloze": "the country is", "new_e_ent_alias": ["SL"],
    "images": ["/home/x/images/a.jpg", "/home/x/images/b.jpg", "/home/x/images/c.jpg"],
    "ie_question_paraphrases": {"ie_question": "?", "ie_ques_paraphrases": ["which nation?", "what land?"]},
}  # fmt: skip
MC_MKE_RELATION = {
    "s": "Norland", "r": "capital", "o": "Norburg", "new_o": "Sudburg", "images": ["/home/x/images/a.jpg"],
    "iro_question": "what is its capital?", "iro_cloze": "the capital is", "iro_edit_input_idx": 0,
}  # fmt: skip
CONSISTENCY = {
    "ie_edit_input_idx": 0, "consistency_iro_image": "/home/x/images/a.jpg",
    "consistency_iro_input_cloze": "the capital of the country in the picture is", "consistency_iro_output": "Sudburg",
}  # fmt: skip
LLAVA = {
    "id": "7", "image": "coco/1.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"},
    ],
}  # fmt: skip
CHAT = {
    "images": ["1.jpg"],
    "messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "<image>what is it?"},
        {"role": "assistant", "content": "a dog"},
    ],
}  # fmt: skip


def read(tmp_path: Path, *values: Any) -> list[RawRecord]:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values))
    return list(read_records(str(path)))


def further(item: RawRecord) -> dict[str, tuple[str, str, str | None]]:
    """Prompt, target and picture of the probes beside MMEdit's."""
    assert item.problem == ""
    texts: dict[str, ProbeText] = probe_texts(item.fields, item.task)
    return {
        name: (text.prompt, text.target, text.image and text.image.path)
        for name, text in texts.items()
        if name not in ("t_gen", "m_gen", "t_loc", "m_loc")
    }


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (MMEDIT, "MMEdit"), (VLKEB, "VLKEB"), (CCKEB, "CCKEB"),
        (MMKE_ENTITY, "MMKE-Bench"), (MMKE_VISUAL, "MMKE-Bench"),
        (COMPREHEND, "ComprehendEdit"), (MC_MKE_ENTITY, "MC-MKE"), (MC_MKE_RELATION, "MC-MKE"),
        (LLAVA, "conversations"), (CHAT, "conversations"),
        ({"image": "a", "question": "b", "answer": "c"}, "own records"),
    ],
)  # fmt: skip
def test_each_layout_is_recognised_told_and_read(tmp_path: Path, value: dict[str, Any], name: str) -> None:
    assert layout_of(value).name == name
    assert read(tmp_path, value)[0].problem == ""
    report = CheckReport()
    assert list(check_records(str(tmp_path / "a.json"), None, None, report, read_images=False)) == []
    assert next(report.lines()).startswith(f"Layout: {name}.")


def test_portability_of_vlkeb_is_probes_by_hop(tmp_path: Path) -> None:
    first, second = read(tmp_path, VLKEB, MMEDIT)
    assert further(first) == {
        "port_gen_1hop_1": ("in which country is it?", "Norland", MMEDIT["image"]),
        "port_gen_2hop_1": ("in which country is it?", "Anna", MMEDIT["image"]),
    }
    assert further(second) == {}


def test_cckeb_has_compositional_questions(tmp_path: Path) -> None:
    (item,) = read(tmp_path, CCKEB)
    assert further(item) == {"port_gen_comp_1": ("in which country is it?", "Norland", MMEDIT["image"])}


def test_mmke_of_an_entity(tmp_path: Path) -> None:
    (item,) = read(tmp_path, MMKE_ENTITY)
    image, other = MMEDIT["image"], MMEDIT["image_rephrase"]
    assert further(item) == {
        "trel_gen_1": ("who made it?", "Anna", None),
        "trel_gen_2": ("when?", "in 1990", None),
        "mrel_gen_1": ("who made this?", "Anna", image),
        "mrel_gen_2": ("when was this made?", "in 1990", image),
        "mrel_gen_other_1": ("who made this?", "Anna", other),
        "mrel_gen_other_2": ("when was this made?", "in 1990", other),
        "port_gen_1hop_1": ("in which country is it?", "Norland", image),
    }


def test_mmke_of_what_is_seen(tmp_path: Path) -> None:
    (item,) = read(tmp_path, MMKE_VISUAL)
    found = further(item)
    assert found["mrel_gen_other_1"] == ("what is meant here?", "stop", MMEDIT["image_rephrase"])
    assert found["port_gen_1hop_1"][2] == "hop.jpg"
    assert set(found) == {"trel_gen_1", "mrel_gen_1", "mrel_gen_other_1", "port_gen_1hop_1"}


def test_comprehendedit_has_names_of_its_own(tmp_path: Path) -> None:
    (item,) = read(tmp_path, COMPREHEND)
    texts = probe_texts(item.fields, item.task)
    assert set(texts) == {"t_gen", "t_loc", "m_loc"} and item.fields["alt"] == "parrot"
    assert (texts["t_loc"].prompt, texts["m_loc"].target) == ("when does it come out", "red")


def test_mc_mke_with_its_file_of_consistency_questions(tmp_path: Path) -> None:
    (tmp_path / "final_ie_test_consistency.jsonl").write_text(json.dumps(CONSISTENCY))
    item, no_question = read(tmp_path, MC_MKE_ENTITY, MC_MKE_ENTITY | {"ie_edit_input_idx": 1})
    assert [item.fields[name] for name in ("image", "src", "alt", "pred", "rephrase", "image_rephrase")] == [
        "a.jpg", "which country is it?", "Sudland", "Norland", "which nation?", "b.jpg",
    ]  # fmt: skip
    consistency = ("the capital of the country in the picture is", "Sudburg", "a.jpg")
    others = {
        "picture_gen_1": ("which country is it?", "Sudland", "c.jpg"),
        "wording_gen_1": ("what land?", "Sudland", "a.jpg"),
    }
    assert further(item) == others | {"consistency_gen_1": consistency}
    assert further(no_question) == others


def test_mc_mke_of_a_relation(tmp_path: Path) -> None:
    asked = {"iro_edit_input_idx": 0, "consistency_sro_cloze": "the capital of Norland is", "new_o": "Sudburg"}
    (tmp_path / "final_iro_consistency.jsonl").write_text(json.dumps(asked))
    (item,) = read(tmp_path, MC_MKE_RELATION)
    assert (item.fields["alt"], item.fields["fact"]) == ("Sudburg", "capital of Norland")
    assert further(item) == {"consistency_gen_1": ("the capital of Norland is", "Sudburg", None)}


@pytest.mark.parametrize("value", [LLAVA, CHAT])
def test_a_conversation_of_one_turn(tmp_path: Path, value: dict[str, Any]) -> None:
    (item,) = read(tmp_path, value)
    assert (item.problem, item.fields["src"], item.fields["alt"]) == ("", "what is it?", "a dog")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (LLAVA | {"conversations": LLAVA["conversations"] * 2}, "conversation: it has 4 turns, expected one question"),
        (LLAVA | {"conversations": ["hello"]}, "wrong type: a turn of the conversation is no object"),
        (LLAVA | {"image": ["1.jpg", "2.jpg"]}, "several pictures: field 'image' lists 2"),
        ({key: value for key, value in LLAVA.items() if key != "image"}, "missing field: field 'image' is not there"),
        (LLAVA | {"video": "1.mp4"}, "video: field 'video' names one"),
        ({"sro_edit_input_idx": 0, "new_o": "x"}, "no picture: field 'images' lists none"),
        (MMEDIT | {"port_new": [{"port_type": "1-hop"}]}, "wrong type: an entry of field 'port_new' holds no object"),
        (MMEDIT | {"port_new": [{"Q&A": {"Question": 3}}]}, "wrong type: probes['port_gen_hop_1'].prompt is a number"),
    ],
)
def test_what_is_no_edit_of_one_picture_is_refused_by_name(tmp_path: Path, value: dict[str, Any], said: str) -> None:
    assert read(tmp_path, value)[0].problem.startswith(said)


def test_the_check_names_fields_that_nobody_reads(tmp_path: Path) -> None:
    read(tmp_path, VLKEB | {"rephrse": "?", "note": 1}, COMPREHEND)
    report = CheckReport()
    list(check_records(str(tmp_path / "a.json"), None, None, report, read_images=False))
    assert set(report.unread) == {"rephrse", "note", "pid", "source", "Category", "img_topk"}
    (line,) = [line for line in report.lines() if line.startswith("Fields that nobody reads")]
    assert "'rephrse' (did you mean 'rephrase'?) in 1" in line and "'note' in 1" in line


def test_the_check_counts_what_records_share(tmp_path: Path) -> None:
    same = {"image": "a.png", "question": "what?", "answer": "a dog"}
    read(tmp_path, same, same, same | {"answer": "a cat"}, same | {"image": "b.png"})
    report = CheckReport()
    list(check_records(str(tmp_path / "a.json"), None, None, report, read_images=False))
    assert (report.num_pictures, report.num_questions, report.repeated, report.contradicting) == (2, 1, 1, 1)
    said = "\n".join(report.lines())
    assert "4 records, 1 different question, 2 different pictures" in said
    assert "Contradicting: 1 ask an earlier record's question about its picture for another answer" in said
    assert "rephrase 4" in said and "old_answer 4" in said
