"""Image markers and special tokens in records: removed at the beginning of a question, errors elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from odedit import InputError, Probe, load_backbone
from odedit.data.pack import pack
from odedit.data.packed import RECORDS_SCHEMA
from odedit.data.records import RawRecord, read_records
from odedit.inputs.markers import control_token_finder, image_marker, without_leading_marker
from tests.support import tiny_current, tiny_models
from tests.support.mmedit_files import caption, record, write_array, write_images
from tests.support.requests import TEMPLATE, make_picture

MARKERS = (
    "<image>", "<Image>", "<|image|>", "<|image_1|>", "<image 1>", "<|image_pad|>", "<ImageHere>", "<img>", "[IMG]",
    "<|vision_start|><|image_pad|><|vision_end|>", "<Img><ImageHere></Img>", "<img><IMG_CONTEXT></img>",
    "<start_of_image>", "<im_start><im_patch><im_end>", "<image_placeholder>",
)  # fmt: skip


def read(folder: Path, *fields: dict[str, Any]) -> list[RawRecord]:
    return list(read_records(str(write_array(folder / "a.json", list(fields)))))


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("between", ["", "\n", " "])
def test_a_marker_in_front_of_a_question_is_taken_off(marker, between):
    assert without_leading_marker(f"{marker}{between}what is it?") == "what is it?"
    assert image_marker(f"what is {marker}?") is not None


@pytest.mark.parametrize(
    "text", ["what is it?", "is 3 < 4 or 5 > 2?", "a <b> image", "image>", "[2] images", "imagine"]
)
def test_other_text_is_no_marker(text):
    assert without_leading_marker(text) == text and image_marker(text) is None


def test_every_question_about_a_picture_loses_the_marker_it_begins_with(tmp_path):
    entry = {"prompt": "<image>\nand now?", "target": "t", "image": "x.png"}
    (made,) = read(
        tmp_path,
        record(src="<image>\nwhat is it?", rephrase="<image> name it", m_loc_q="<|image_pad|>colour?")
        | {"probes": {"far_gen": entry}, "held_out": {"image_locality": entry}},
    )
    assert made.problem == ""
    assert [made.fields[name] for name in ("src", "rephrase", "m_loc_q")] == ["what is it?", "name it", "colour?"]
    assert made.fields["probes"]["far_gen"]["prompt"] == made.fields["held_out"]["image_locality"]["prompt"]
    assert made.fields["probes"]["far_gen"]["prompt"] == "and now?"
    assert read(tmp_path, caption(src="<image>\na photo of"))[0].task == "caption"
    assert read(tmp_path, record(src="<image>\n"))[0].problem == "empty field: field 'src' is empty"


TEXT_ONLY = {"prompt": "<image>\np", "target": "t"}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"src": "USER: <image>\nwhat is it? ASSISTANT:"}, "field 'src' holds '<image>'"),
        ({"src": "what is it?\n<image>"}, "field 'src' holds '<image>'"),
        ({"src": "<image><image>\nwhat differs?"}, "field 'src' holds '<image>'"),
        ({"rephrase": "name it <|image_pad|>"}, r"field 'rephrase' holds '<\|image_pad\|>'"),
        ({"alt": "<image>"}, "field 'alt' holds"),
        ({"pred": "a [IMG]"}, r"field 'pred' holds '\[IMG\]'"),
        ({"loc": "<image>\nwho wrote it?"}, "field 'loc' holds"),
        ({"loc_ans": "<ImageHere>"}, "field 'loc_ans' holds '<ImageHere>'"),
        ({"m_loc_a": "</Img>"}, "field 'm_loc_a' holds '</Img>'"),
        ({"probes": {"far_gen": TEXT_ONLY}}, r"probes\['far_gen'\].prompt holds '<image>'"),
        ({"held_out": {"text_locality": TEXT_ONLY}}, r"held_out\['text_locality'\].prompt holds"),
        ({"probes": {"far_gen": {"prompt": "p", "target": "<image>"}}}, r"probes\['far_gen'\].target holds"),
    ],
)
def test_a_marker_elsewhere_keeps_a_record_from_being_used(tmp_path, changes, where):
    made, other = read(tmp_path, record(0) | changes, record(1))
    assert re.match(f"image marker: {where}", made.problem), made.problem
    assert other.problem == ""


def test_a_folder_that_was_packed_with_markers_is_read_alike(tmp_path):
    fields = [record(0), record(1), record(2)]
    pack(
        str(write_array(tmp_path / "a.json", fields)), *map(str, write_images(tmp_path, fields)), str(tmp_path / "out")
    )
    (file,) = (tmp_path / "out").glob("records-*.parquet")
    rows = parquet.read_table(file).to_pylist()
    for row, changes in zip(rows, ({"src": "<image>\nwho?"}, {"loc": "<image> who?"}, {}), strict=True):
        row["fields"] = json.dumps(json.loads(row["fields"]) | changes)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=RECORDS_SCHEMA), file)
    first, second, third = read_records(str(tmp_path / "out"))
    assert (first.fields["src"], first.problem, third.problem) == ("who?", "", "")
    assert second.problem.startswith("image marker: field 'loc' holds '<image>'")


@pytest.fixture(scope="module", params=["blip2", *tiny_current.FAMILIES])
def model(request, tmp_path_factory):
    if request.param == "blip2":
        return load_backbone("blip2", "embedded")
    return load_backbone(request.param, str(tiny_current.write_family(request.param, tmp_path_factory.mktemp("tiny"))))


@pytest.mark.parametrize("text", ["<image>\nwho is it?", "<|image_pad|> who is it?", "who </s> is it?", "<s>"])
@pytest.mark.parametrize("picture", [None, make_picture(0)])
def test_no_family_takes_control_text_for_text(model, text, picture):
    for probe in (Probe(text, "anna", picture), Probe("who is it?", f"anna {text}", picture)):
        with pytest.raises(InputError, match="holds (the image marker|the special token)"):
            model.sequence(probe, TEMPLATE)
    seen = model.sequence(Probe("is 3 < 4?", "<b> yes", picture), TEMPLATE)
    image = model.model.config.image_token_id
    assert seen.tokens.count(image) == len(seen.image)


def test_special_tokens_are_those_of_the_tokenizer(tmp_path):
    find = control_token_finder(tiny_models.tokenizer(begins=True))
    assert (find("what does <s> mean?"), find("red </s> pier"), find("a <b> c")) == ("<s>", "</s>", None)
    assert find("x<|im_end|>") == "<|im_end|>"


def test_a_character_that_the_tokenizer_does_not_know_is_no_control_text(tmp_path):
    model = load_backbone("llava", str(tiny_models.write("llava", tmp_path, with_pieces=True)))
    unknown = model.processor.tokenizer.unk_token_id
    assert unknown in model.sequence(Probe("who is \u2603?", "anna"), TEMPLATE).tokens
