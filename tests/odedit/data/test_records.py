import json
import re
import tracemalloc
from decimal import Decimal

import pyarrow
import pytest
from pyarrow import parquet

from odedit.data.fields import (
    ENTITIES,
    FACTS,
    ImageReference,
    held_out_texts,
    probe_texts,
    request_images,
    scored_things,
    supervising_things,
)
from odedit.data.records import RawRecord, read_records
from odedit.errors import InputError
from tests.support.mmedit_files import caption, record, write_array
from tests.support.paths import ROOT

FIELDS = list(record())


def read_one(tmp_path, fields, **options):
    return next(read_records(str(write_array(tmp_path / "vqa_eval.json", [fields])), **options))


def test_the_record_shown_on_the_page_has_every_field_and_is_usable(tmp_path):
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "odedit/data/README.md").read_text(), flags=re.DOTALL)
    shown = json.loads(text)
    assert set(shown) == {*FIELDS, *FACTS, *ENTITIES, "edit_id", "task", "probes", "held_out"}
    item = read_one(tmp_path, shown)
    assert (item.problem, item.edit_id, item.fields) == ("", shown["edit_id"], shown)
    assert set(probe_texts(item.fields, item.task)) == {"t_gen", "m_gen", "t_loc", "m_loc", *shown["probes"]}


def test_reads_a_json_array(tmp_path):
    path = write_array(tmp_path / "vqa_eval.json", [record(0), record(1)])
    records = list(read_records(str(path)))
    assert [(item.file, item.index, item.edit_id) for item in records] == [
        ("vqa_eval.json", 0, "vqa_eval-000000"),
        ("vqa_eval.json", 1, "vqa_eval-000001"),
    ]
    assert [item.fields for item in records] == [record(0), record(1)]
    assert not any(item.problem for item in records)


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_every_format_gives_the_same_fields(tmp_path, ending):
    fields = [record(0, edit_id="a"), record(1, edit_id="b", alt="\u00e9t\u00e9 \U0001f600")]
    path = tmp_path / f"records.{ending}"
    if ending == "json":
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(fields, ensure_ascii=False).encode())
    elif ending == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(item) for item in fields).encode())
    else:
        parquet.write_table(pyarrow.Table.from_pylist(fields), path)
    for text in (str(path), path.as_uri()):
        records = list(read_records(text))
        assert [item.fields for item in records] == fields
        assert [item.problem for item in records] == ["", ""]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_every_encoding_of_json_is_read(tmp_path, ending, encoding):
    fields = [record(number, alt="\u00e9t\u00e9 \U0001f600", padding="\u4e00" * 40_000) for number in range(3)]
    lines = [json.dumps(item, ensure_ascii=False) for item in fields]
    text = "[" + ",\n".join(lines) + "]" if ending == "json" else "\n".join(lines)
    (tmp_path / f"a.{ending}").write_bytes(text.encode(encoding))
    assert [item.fields for item in read_records(str(tmp_path / f"a.{ending}"))] == fields


def test_a_file_of_lines_that_ends_within_a_character_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(record()).encode("utf-16")[:-1])
    with pytest.raises(InputError, match="reading failed after line 0"):
        list(read_records(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1e999, "infinite")])
def test_a_number_that_is_none_matters_where_it_is_needed(tmp_path, value, said):
    fields = [record(0, score=value), record(1, alt=value), record(2), record(3, probes={"a_gen": {"prompt": value}})]
    write_array(tmp_path / "a.json", fields)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, fields)))
    frames = [{key: one[key] for key in record()} | {"score": one.get("score")} for one in (fields[0], fields[2])]
    parquet.write_table(pyarrow.Table.from_pylist(frames), tmp_path / "a.parquet")
    problems = [
        "",
        f"wrong type: field 'alt' is {said}, expected text",
        "",
        f"wrong type: probes['a_gen'].prompt is {said}",
    ]
    for ending in ("json", "jsonl"):
        records = list(read_records(str(tmp_path / f"a.{ending}")))
        assert [item.problem[: len(end)] for item, end in zip(records, problems, strict=True)] == problems
        assert records[0].problem == records[2].problem == ""
        assert RawRecord.from_row(records[0].to_row()).fields["src"] == fields[0]["src"]
    assert [item.problem for item in read_records(str(tmp_path / "a.parquet"))] == ["", ""]


def test_a_nested_line_is_a_record_with_a_problem(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 40 + "]" * 40 + "\n" + json.dumps(record()))
    first, second = read_records(str(tmp_path / "a.jsonl"))
    assert "nested deeper than 32 levels" in first.problem and second.problem == ""
    (tmp_path / "a.json").write_text("[" * 40 + "]" * 40)
    with pytest.raises(InputError, match="nested deeper than 32 levels"):
        list(read_records(str(tmp_path / "a.json")))


def test_parquet_nulls_are_absent_fields(tmp_path):
    probe = {"prompt": "p", "target": "t"}
    rows = [record(0), record(1, probes=json.dumps({"far_gen": probe})), record(2, probes="no json")]
    rows[0]["m_loc"] = None
    path = tmp_path / "records.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.Table.from_pylist(rows[::-1]).schema), path)
    first, second, third = read_records(str(path))
    assert first.problem == "missing field: field 'm_loc' is not there"
    assert second.problem == "" and second.fields["probes"] == {"far_gen": probe}
    assert third.problem.startswith("wrong type: field 'probes' is text")


@pytest.mark.parametrize("name", FIELDS)
def test_missing_field(tmp_path, name):
    problem = read_one(tmp_path, record(**{name: None})).problem
    is_optional = name in ("pred", "rephrase", "image_rephrase")
    assert problem == ("" if is_optional else f"missing field: field {name!r} is not there")


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    ("value", "said"), [(12, "a number"), ([3], "a list"), ({}, "an object"), (True, "true or false"), (0.5, "a num")]
)
def test_wrong_type(tmp_path, name, value, said):
    problem = read_one(tmp_path, record(**{name: value})).problem
    assert problem.startswith(f"wrong type: field {name!r} is {said}")


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "alt"])
def test_empty_field(tmp_path, name):
    for empty in ("", " \n"):
        assert read_one(tmp_path, record(**{name: empty})).problem == f"empty field: field {name!r} is empty"


def test_empty_target_is_not_an_edit(tmp_path):
    assert read_one(tmp_path, record(alt="", src="")).problem == "not an edit: field 'alt' is empty"


def test_captions_are_told_by_their_prompt_and_may_lack_a_prediction(tmp_path):
    assert read_one(tmp_path, caption(pred="")).problem == ""
    assert read_one(tmp_path, caption()).task == "caption"
    assert read_one(tmp_path, record()).task == "vqa"
    assert read_one(tmp_path, record(), task="caption").task == "caption"
    assert read_one(tmp_path, caption(task="vqa")).task == "vqa"
    assert read_one(tmp_path, record(task="vqs")).problem.startswith("invalid task: field 'task' is 'vqs'")
    with pytest.raises(InputError, match=r"data\.task: got 'images'"):
        next(read_records("x.json", task="images"))


@pytest.mark.parametrize("value", [None, 3, "text", [1], True])
def test_a_record_that_is_no_object(tmp_path, value):
    first, second = read_records(str(write_array(tmp_path / "a.json", [value, record()])))
    assert first.problem.startswith("wrong type: the record is") and json.dumps(value).strip('"') == str(
        first.fields["unparsed"]
    )
    assert second.problem == "" and second.index == 1


def test_unpaired_surrogate(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(alt="\ud800")))
    assert next(read_records(str(path))).problem.startswith("invalid text: field 'alt'")


@pytest.mark.parametrize("edit_id", ["", "../x", "a/b", ".hidden", "x" * 129, "a b", "\u00e9"])
def test_invalid_edit_id(tmp_path, edit_id):
    item = read_one(tmp_path, record(edit_id=edit_id))
    assert item.problem.startswith("invalid edit_id: ") and item.edit_id == "vqa_eval-000000"


def test_repeated_edit_ids_stay_apart(tmp_path):
    fields = [record(0, edit_id="a-000001"), record(1), record(2, edit_id="a-000001"), record(3, edit_id=7)]
    records = list(read_records(str(write_array(tmp_path / "a.json", fields))))
    assert [item.edit_id for item in records] == ["a-000001", "a-000001a", "a-000002", "a-000003"]
    assert [item.problem.split(":")[0] for item in records] == ["", "", "repeated edit_id", "wrong type"]


def test_an_edit_id_that_an_earlier_record_got_by_default(tmp_path):
    fields = [record(0), record(1, edit_id="a-000000"), record(2, edit_id="a-000002"), record(3, edit_id="a-0000003")]
    records = list(read_records(str(write_array(tmp_path / "a.json", fields))))
    assert [item.edit_id for item in records] == ["a-000000", "a-000001", "a-000002", "a-0000003"]
    assert [item.problem.split(":")[0] for item in records] == ["", "repeated edit_id", "", ""]


def test_default_edit_id_of_an_odd_file_name(tmp_path):
    path = write_array(tmp_path / "__ my eval (2)\u00e9.json", [record()])
    assert next(read_records(str(path))).edit_id == "my-eval-2--000000"


PROBE = {"prompt": "p", "target": "t", "image": "x.png"}


@pytest.mark.parametrize(
    ("group", "value", "said"),
    [
        ("probes", [], "wrong type: field 'probes' is a list"),
        ("probes", {"speed": PROBE}, "unknown probe: 'speed'"),
        ("probes", {"rel": PROBE}, "unknown probe: 'rel' is made from"),
        ("probes", {"t_loc_mmedit": PROBE}, "unknown probe: 't_loc_mmedit': 'mmedit' ends the name"),
        ("probes", {"m_loc": PROBE}, "unknown probe: 'm_loc' is made from"),
        ("probes", {"far_gen": "text"}, "wrong type: probes['far_gen'] is text"),
        ("probes", {"far_gen": {"prompt": "p"}}, "missing field: probes['far_gen'].target"),
        ("probes", {"far_gen": PROBE | {"image": 3}}, "wrong type: probes['far_gen'].image is a number"),
        ("probes", {"far_gen": PROBE | {"image": ""}}, "empty field: probes['far_gen'].image"),
        ("probes", {"far_gen": PROBE | {"prompt": "x" * 60_000}}, "text too long: probes['far_gen'].prompt has 60,000"),
        ("probes", {"far_gen": PROBE | {"img": "x"}}, "unknown key: probes['far_gen'] has 'img'"),
        ("probes", {"far_loc": PROBE | {"fact": 3}}, "wrong type: probes['far_loc'].fact is a number"),
        ("probes", {"far_loc": PROBE | {"fact": " "}}, "empty field: probes['far_loc'].fact"),
        ("held_out", {"text_rephrase": PROBE | {"fact": "f"}}, "unknown key: held_out['text_rephrase'] has 'fact'"),
        ("held_out", {"locality": PROBE}, "unknown slot: held_out has 'locality'"),
        ("held_out", {"edit": PROBE}, "unknown slot: held_out has 'edit'"),
        ("held_out", {"text_rephrase": PROBE | {"prompt": ""}}, "empty field: held_out['text_rephrase'].prompt"),
    ],
)
def test_bad_extension(tmp_path, group, value, said):
    assert read_one(tmp_path, record(**{group: value})).problem.startswith(said)


def test_probes_and_the_images_they_need(tmp_path):
    fields = record(
        1,
        probes={"m_loc_near": {"prompt": "p", "target": "t", "image": "rephrase:a.png"}, "far_gen": {**PROBE}},
        held_out={"text_locality": {"prompt": "q", "target": "u", "image": None}},
    )
    assert read_one(tmp_path, fields).problem == ""
    texts = probe_texts(fields, "vqa")
    assert list(texts) == ["t_gen", "m_gen", "t_loc", "m_loc", "m_loc_near", "far_gen"]
    image = ImageReference(fields["image"])
    rephrased = ImageReference(fields["image_rephrase"], "rephrase")
    assert (texts["t_gen"].prompt, texts["t_gen"].target, texts["t_gen"].image) == (fields["rephrase"], "dog 1", image)
    assert (texts["m_gen"].prompt, texts["m_gen"].target, texts["m_gen"].image) == (fields["src"], "dog 1", rephrased)
    assert (texts["t_loc"].prompt, texts["t_loc"].target, texts["t_loc"].image) == (fields["loc"], "Author 1", None)
    assert texts["m_loc"].image == ImageReference(fields["m_loc"])
    assert texts["m_loc_near"].image == ImageReference("a.png", "rephrase")
    assert held_out_texts(fields, "vqa")["text_locality"].image is None
    expected = [image, rephrased, ImageReference(fields["m_loc"]), texts["m_loc_near"].image, ImageReference("x.png")]
    assert request_images(fields) == expected


@pytest.mark.parametrize("name", [*FACTS, *ENTITIES])
def test_a_bad_fact_or_entity(tmp_path, name):
    assert read_one(tmp_path, record(**{name: 3})).problem == f"wrong type: field {name!r} is a number, expected text"
    assert read_one(tmp_path, record(**{name: ""})).problem == f"empty field: field {name!r} is empty"


def test_facts_that_probes_ask_about(tmp_path):
    near = PROBE | {"fact": "colour of car 2"}
    fields = record(1, loc_fact="author of book 1", m_loc_fact="colour of car 1", probes={"m_loc_near": near})
    assert read_one(tmp_path, fields).problem == ""
    asked = {name: text.fact for name, text in probe_texts(fields, "vqa").items()}
    assert asked == {"t_gen": None, "m_gen": None, "t_loc": "author of book 1"} | {
        "m_loc": "colour of car 1", "m_loc_near": "colour of car 2",
    }  # fmt: skip


def test_entities_that_probes_are_about(tmp_path):
    near = PROBE | {"entity": "car 2"}
    named = {"entity": "car 0", "loc_entity": "book 1", "m_loc_entity": "car 1"}
    fields = record(1, probes={"m_loc_near": near}, loc_fact="author of book 1", **named)
    assert read_one(tmp_path, fields).problem == ""
    about = {name: text.entity for name, text in probe_texts(fields, "vqa").items()}
    assert about == {"t_gen": "car 0", "m_gen": "car 0", "t_loc": "book 1", "m_loc": "car 1", "m_loc_near": "car 2"}
    stay = {"entity: book 1", "fact: author of book 1", "entity: car 1", "entity: car 2"}
    assert scored_things(fields, "vqa") == stay
    assert supervising_things(fields) == {"entity: car 0", *stay} - {"entity: car 2"}
    held_out = {"near_locality": near}
    assert (
        "unknown key: held_out['near_locality'] has 'entity'" in read_one(tmp_path, record(held_out=held_out)).problem
    )


def test_limit_counts_usable_records(tmp_path):
    fields = [record(0), record(1, alt=""), record(2), record(3, alt=""), record(4)]
    path = str(write_array(tmp_path / "a.json", fields))
    assert [item.index for item in read_records(path, limit=2)] == [0, 1, 2]
    assert list(read_records(path, limit=0)) == []
    assert len(list(read_records(path, limit=9))) == 5
    with pytest.raises(InputError, match="limit"):
        list(read_records(path, limit=-1))


def test_row_round_trip(tmp_path):
    item = RawRecord("a.json", 3, "a-000003", "vqa", {"src": "x", "number": Decimal("0.5"), "half": "\ud800"}, "bad: x")
    row = item.to_row()
    assert all(isinstance(value, (str, int)) for value in row.values())
    row["fields"].encode("utf-8")
    assert RawRecord.from_row(row | {"more": 1}) == item


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"", "before the first record"),
        ("a.json", b"{}", r"expected a JSON array.*\.jsonl"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"expected a JSON array.*\.jsonl"),
        ("a.json", b"not json", "not valid JSON before the first record"),
        ("a.json", b"[{}, {}, {", "not valid JSON after record 1 .*cut off"),
        ("a.json", b"[{}, {}", "not valid JSON after record 1"),
        ("a.json", b"[{}] x", "not valid JSON after record 0"),
        ("a.json", b"[{}, x]", "not valid JSON after record 0"),
        ("a.json", b"[" * 100_000, "nested deeper"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.txt", b"x", "not a file of records by its name"),
    ],
)
def test_broken_file(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        list(read_records(str(path)))
    assert str(path) in str(caught.value)


def test_records_before_the_break_are_given(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(number) for number in range(300)])[:-500])
    records = []
    with pytest.raises(InputError, match="after record 297"):
        for item in read_records(str(path)):
            records.append(item)
    assert len(records) == 298


def test_truncated_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([record(0)]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        list(read_records(str(path)))


def test_bad_lines_are_records_with_a_problem(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(record()).encode()
    path.write_bytes(b"\n".join([good, b"{broken", b"\xff\xfe", b"[" * 50_000, b"", good[:-5]]))
    records = list(read_records(str(path)))
    kinds = [item.problem.split(":")[0] for item in records]
    assert kinds == ["", "invalid JSON", "invalid JSON", "invalid JSON", "invalid JSON"]
    assert "line 2" in records[1].problem and records[1].fields == {"unparsed": "{broken"}
    assert "line 6" in records[4].problem
    assert records[0].where == "a.jsonl, record 0"
    assert records[1].where == "a.jsonl", "its problem says which line it is"
    assert records[1].problem.count("line") == 1


def test_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr("odedit.data.readers.MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([record(number) for number in range(9)]))
    with pytest.raises(InputError, match=r"line 1 is longer.*\.json"):
        list(read_records(str(path)))


def test_a_record_without_end(tmp_path):
    path = tmp_path / "a.json"
    large = record(2) | {"of no use": "x" * 17 * 2**20}
    path.write_text(json.dumps([record(0), record(1) | {"of no use": "x" * 15 * 2**20}, large, record(3)]))
    records = read_records(str(path))
    assert [next(records).index, next(records).index] == [0, 1]
    with pytest.raises(InputError, match=r"record 2 is larger than 16 MiB"):
        next(records)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.json", "no such file"),
        ("", "empty path"),
        ("zz://b/x.json", "cannot use the address"),
        (".", "pack.json"),
    ],
)
def test_nothing_to_read(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        list(read_records(path))


def peak_bytes(path):
    tracemalloc.start()
    for _ in read_records(str(path)):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    peaks = []
    for count in (500, 5000):
        path = tmp_path / f"{count}.{ending}"
        lines = (json.dumps(record(number, padding="x" * 1000)) for number in range(count))
        text = "[" + ",\n".join(lines) + "]" if ending == "json" else "\n".join(lines)
        path.write_text(text)
        peaks.append(peak_bytes(path))
    assert peaks[1] - peaks[0] < 50_000  # the files hold 0.7 MB and 7 MB
