"""Tables of records: CSV and TSV, Parquet with pictures, folders of it, and data sets saved on disk."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from odedit.data.images import ImageError, ImageReader
from odedit.data.records import RawRecord, read_records
from odedit.errors import InputError
from tests.support.mmedit_files import encoded, picture

HEADER = "image,question,answer,rephrase"
LINE = 'a.png,"what, please, is it?",a dog,'


def read(path: Path, data: bytes | str) -> list[RawRecord]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_records(str(path)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join([HEADER, LINE, "", "b.png,what?,\u00e9t\u00e9,name it"]) + end
    first, second = read(tmp_path / "a.csv", text.encode(encoding))
    assert first.fields["src"] == "what, please, is it?" and "rephrase" not in first.fields
    assert (second.fields["alt"], second.fields["rephrase"], second.problem) == ("\u00e9t\u00e9", "name it", "")


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.csv", "|")])
def test_other_delimiters(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = ["image,question,answer", "a.png,what?,a dog"]
    (item,) = read(tmp_path / name, "\n".join(rows).replace(",", delimiter))
    assert (item.problem, item.fields["alt"]) == ("", "a dog")


def test_a_cell_may_hold_a_line_break_and_probes_as_json(tmp_path: Path) -> None:
    probes = json.dumps({"far_gen": {"prompt": "p", "target": "t"}}).replace('"', '""')
    (item,) = read(tmp_path / "a.csv", f'image,question,answer,probes\na.png,"what\nis it?",dog,"{probes}"')
    assert item.problem == "" and item.fields["src"] == "what\nis it?" and "far_gen" in item.fields["probes"]


def test_a_bad_line_costs_one_record(tmp_path: Path) -> None:
    lines = [HEADER, LINE, "a.png,what?,dog,name it,more", "a.png,what?", "a.png,what?,d\udcffg,", LINE]
    records = read(tmp_path / "a.csv", "\n".join(lines).encode("utf-8", "surrogateescape"))
    assert [item.problem.split(" holds")[0] for item in records] == [
        "",
        "wrong number of cells: line 3 has 5, and the first line names 4; a cell with ',' in it needs quotes",
        "missing field: field 'answer' is not there",
        "invalid text: field 'answer'",
        "",
    ]
    assert len({item.edit_id for item in records}) == 5


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"", "is empty, expected a first line"),
        ("a.csv", b"image,image,answer\n", "names the column 'image' twice"),
        ("a.csv", b'image,question\na.png,"' + b"x" * (17 * 2**20), "longer than 16 MiB"),
        ("a.csv", b'image,question\n"' + b"x\n" * (9 * 2**20), "cannot be read as a table"),
        ("a.csv.gz", gzip.compress(b"image,question,answer\n" * 999, mtime=0)[:30], "cut off or damaged"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.parquet.gz", b"", "not a file of records by its name"),
    ],
)
def test_a_damaged_table_is_refused_in_a_sentence(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path / name, data)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "tsv"])
def test_zipped_files(tmp_path: Path, ending: str) -> None:
    value = {"image": "a.png", "question": "what?", "answer": "a dog"}
    table = "\n".join([",".join(value), ",".join(value.values())])
    texts = {"csv": table, "tsv": table.replace(",", "\t"), "json": json.dumps([value]), "jsonl": json.dumps(value)}
    (item,) = read(tmp_path / f"my records.{ending}.gz", gzip.compress(texts[ending].encode()))
    assert item.problem == "" and item.edit_id.startswith("a-dog-")


def test_bytes_that_are_no_utf8_cost_their_record_of_an_array(tmp_path: Path) -> None:
    data = json.dumps([{"image": "a.png", "question": "what?", "answer": name} for name in ("xx", "dog")]).encode()
    first, second = read(tmp_path / "a.json", data.replace(b"xx", b"d\xffg"))
    assert first.problem.startswith("invalid text: field 'answer'") and second.problem == ""


IMAGES = [encoded(picture(number), "JPEG") for number in range(5)]
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def values(kind: str) -> list[dict[str, Any]]:
    images: list[Any] = {
        "struct": [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(IMAGES)],
        "bytes": IMAGES,
        "list": [[{"bytes": data, "path": None}] for data in IMAGES],
    }[kind]
    return [{"image": image, "question": "what?", "answer": f"dog {number}"} for number, image in enumerate(images)]


def table(kind: str) -> pyarrow.Table:
    types = {"struct": STRUCT, "bytes": pyarrow.binary(), "list": pyarrow.list_(STRUCT)}
    fields = [("image", types[kind]), ("question", pyarrow.string()), ("answer", pyarrow.string())]
    return pyarrow.Table.from_pylist(values(kind), schema=pyarrow.schema(fields))


def check_pictures(path: Path, count: int = 5) -> list[RawRecord]:
    """Reads every record with its picture, in another order and in another process's copy of the reader."""
    records = list(read_records(str(path)))
    assert [item.problem for item in records] == [""] * count
    reader = pickle.loads(pickle.dumps(ImageReader.for_records(str(path))))
    for item in records[::-1]:
        assert reader.read_bytes(item.fields["image"]) == IMAGES[int(item.fields["alt"][-1])]
    return records


@pytest.mark.parametrize("kind", ["struct", "bytes", "list"])
def test_pictures_in_a_parquet_file(tmp_path: Path, kind: str) -> None:
    parquet.write_table(table(kind), tmp_path / "a b#.parquet", row_group_size=2)
    records = check_pictures(tmp_path / "a b#.parquet")
    parquet.write_table(table(kind).slice(1), tmp_path / "later.parquet")
    if kind != "list":  # the id is of the picture, not of its place
        assert [item.edit_id for item in read_records(str(tmp_path / "later.parquet"))] == [
            item.edit_id for item in records[1:]
        ]


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    for number in range(2):
        part = table("struct").slice(3 * number, 3)
        parquet.write_table(part, tmp_path / f"train-{number:05d}-of-00002.parquet", row_group_size=2)
    check_pictures(tmp_path)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_data_set_saved_on_disk(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    for number in range(2):
        part = table("struct").slice(3 * number, 3)
        path = folder / f"data-{number:05d}-of-00002.arrow"
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    check_pictures(folder)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved"]}')
    with pytest.raises(InputError, match="holds several splits of a data set; name one of them: saved"):
        list(read_records(str(tmp_path)))


def test_a_path_beside_null_bytes_is_read_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(IMAGES[0])
    row = {"image": {"bytes": None, "path": "x.jpg"}, "question": "what?", "answer": "a dog"}
    schema = table("struct").schema
    parquet.write_table(pyarrow.Table.from_pylist([row], schema=schema), tmp_path / "a.parquet")
    (item,) = read_records(str(tmp_path / "a.parquet"))
    assert item.fields["image"] == "x.jpg"


def test_a_table_that_has_changed_since_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table("struct"), path)
    reference = next(read_records(str(path))).fields["image"]
    parquet.write_table(table("struct").slice(1), path)
    with pytest.raises(ImageError, match="holds another picture than when it was read"):
        ImageReader.for_records(str(path)).read(reference)
    for wrong in ("cell:..#0/0/image?x", "cell:a.parquet#9/0/image?x", "cell:a.parquet#0/0/none?x", "cell:a"):
        with pytest.raises(ImageError):
            ImageReader.for_records(str(path)).read(wrong)
