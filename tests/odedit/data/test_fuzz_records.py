"""Fuzzing: reading any file gives records, usable or with a problem, or raises one of odedit's own errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from odedit.data.fields import held_out_texts, probe_texts, request_images
from odedit.data.images import ImageError, ImageReader
from odedit.data.records import RawRecord, read_records
from odedit.errors import InputError
from odedit.inputs.batch import Picture
from tests.support import fuzzing
from tests.support.mmedit_files import encoded, picture, record

FUZZ = settings(fuzzing.FUZZ, max_examples=150)
TEXT = st.text(st.characters(codec=None), max_size=12)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
PROBE = st.fixed_dictionaries({}, optional={"prompt": JSON, "target": JSON, "image": JSON, "fact": JSON, "other": JSON})
PROBES = st.dictionaries(TEXT | st.sampled_from(["m_loc_near", "t_loc_far", "a_gen", "text_locality"]), PROBE | JSON)
OPTIONAL = {
    "edit_id": JSON,
    "task": JSON,
    "loc_fact": JSON,
    "m_loc_fact": JSON,
    "probes": JSON | PROBES,
    "held_out": JSON | PROBES,
}
LAYOUT = {
    name: JSON
    for name in (
        "question", "answer", "images", "video", "port_new", "m_rel_1", "rel_ans_1", "knowledge_type", "textual_edit",
        "locality_prompt", "conversations", "ie_edit_input_idx", "iro_question", "named", "consistency",
    )
}  # fmt: skip
TURNS = st.lists(st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt"]) | JSON, "value": JSON}))
PORTS = st.lists(st.fixed_dictionaries({}, optional={"port_type": JSON, "Q&A": JSON | PROBE}) | JSON, max_size=3)
OF_A_LAYOUT = st.fixed_dictionaries({}, optional=LAYOUT | {"conversations": TURNS, "port_new": PORTS})
CHANGES = st.dictionaries(st.sampled_from(list(record())), JSON, max_size=2)
RECORD = st.builds(
    lambda changes, extra: record() | changes | extra, CHANGES, st.fixed_dictionaries({}, optional=OPTIONAL)
)
SHORT = st.builds(
    lambda image, more: {"image": image, "question": "what?", "answer": "a dog"} | more, JSON, OF_A_LAYOUT
)
SYNTAX = st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b",", b":", b'"', b"\n", b"src", b"1", b"\xff", b"\\u"]))
BYTES = st.binary(max_size=200) | SYNTAX.map(b"".join)


def check(path: Path) -> list[RawRecord] | None:
    """Records of a file, with all their texts and images; None if the file is refused."""
    try:
        records = list(read_records(str(path)))
    except InputError:
        return None
    assert len({item.edit_id for item in records}) == len(records)
    for item in records:
        row = RawRecord.from_row(item.to_row())
        assert (row.edit_id, row.task, row.problem) == (item.edit_id, item.task, item.problem)
        item.problem.encode()
        if not item.problem:
            probe_texts(item.fields, item.task)
            held_out_texts(item.fields, item.task)
            request_images(item.fields)
    return records


@FUZZ
@given(
    values=st.lists(JSON | RECORD | SHORT | st.builds(lambda full, more: full | more, RECORD, OF_A_LAYOUT), max_size=4)
)
@example([{"probes": {"x\ud800": {}}} | record()])
@example([record() | {"ie_edit_input_idx": 0, "images": ["a.png"], "consistency": [None]}])
def test_any_json_value_is_a_record_or_a_problem(tmp_path, values):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(value) for value in values))
    records = check(tmp_path / "a.jsonl")
    assert records is not None and len(records) == len(values)
    (tmp_path / "a.json").write_text(json.dumps(values))
    in_array = check(tmp_path / "a.json")
    assert in_array is not None and [item.problem for item in in_array] == [item.problem for item in records]


def test_a_number_of_thousands_of_digits_is_refused_in_words(tmp_path):
    for text in (b"[" + b"1" * 5000 + b"]", b"1" * 5000, b'[{"src": "' + b"x" * 70_000 + b'"}, ' + b"1" * 5000 + b"]"):
        (tmp_path / "a.json").write_bytes(text)
        with pytest.raises(InputError, match="Exceeds the limit"):
            list(read_records(str(tmp_path / "a.json")))


CELLS = st.lists(st.lists(TEXT | st.sampled_from(["a.png", '"', "what?", "\n"]), max_size=5), max_size=4)


@FUZZ
@given(rows=CELLS, delimiter=st.sampled_from(",;\t"), ends=st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_table_is_records_or_refused(tmp_path, rows, delimiter, ends):
    lines = [delimiter.join(row) for row in [["image", "question", "answer"], *rows]]
    (tmp_path / "a.csv").write_bytes(ends.join(lines).encode("utf-8", "surrogatepass"))
    check(tmp_path / "a.csv")


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "csv", "tsv", "arrow", "csv.gz", "json.gz"])
@FUZZ
@given(data=BYTES)
@example(b"")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'[1e999999999, -1E-999999999, {"edit_id": 1e400}]')
@example(b"PAR1\x00\x00\x00\x00PAR1")
def test_any_bytes_are_records_or_refused(tmp_path, ending, data):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(data)
    check(path)


@FUZZ
@given(cuts=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), max_size=3), end=st.integers(0, 800))
def test_a_damaged_array_is_records_or_refused(tmp_path, cuts, end):
    data = bytearray(json.dumps([record(0), record(1)]).encode())
    for start, new in cuts:
        data[start : start + len(new)] = new
    (tmp_path / "a.json").write_bytes(data[:end] if end else data)
    check(tmp_path / "a.json")


IMAGES = {kind: encoded(picture(1), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@FUZZ
@given(
    start=st.sampled_from([*IMAGES.values(), b"", b"II*\0", b"MM\0*", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"]),
    changes=st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=8)), max_size=4),
    tail=st.binary(max_size=60),
)
def test_any_bytes_are_a_picture_or_an_image_error(tmp_path, start, changes, tail):
    data = bytearray(start)
    for position, new in changes:
        data[position : position + len(new)] = new
    (tmp_path / "x.png").write_bytes(bytes(data) + tail)
    try:
        result = ImageReader(str(tmp_path), max_pixels=100_000).read("x.png")
    except ImageError as error:
        assert "x.png" in str(error) and error.kind
    else:
        assert isinstance(result, Picture) and result.pixels.ndim == 3 and result.pixels.shape[-1] == 3
