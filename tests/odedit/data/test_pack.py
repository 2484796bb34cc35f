import json
import pickle
import tracemalloc

import numpy as np
import pytest
from pyarrow import parquet

from odedit.data import pack as pack_module
from odedit.data.fields import probe_texts, request_images
from odedit.data.images import ImageError, ImageReader
from odedit.data.pack import pack
from odedit.data.pool import Pool
from odedit.data.records import read_records
from odedit.data.supervision import Supervision, build_request
from odedit.errors import InputError
from tests.support.mmedit_files import encoded, picture, record, write_array, write_images


@pytest.fixture
def source(tmp_path):
    fields = [record(number, probes={"far_gen": {"prompt": "p", "target": "t"}}) for number in range(6)]
    fields[1]["m_loc"] = fields[0]["m_loc"]
    fields[2]["probes"]["m_loc_near"] = {
        "prompt": "p",
        "target": "t",
        "image": "rephrase:" + fields[0]["image_rephrase"],
    }
    fields[3]["alt"] = ""
    fields[5]["edit_id"] = "chosen"
    image_root, rephrase_root = write_images(tmp_path, fields)
    (image_root / fields[4]["image"]).write_bytes((image_root / fields[0]["image"]).read_bytes())
    path = write_array(tmp_path / "vqa_eval.json", [*fields, "no object"])
    return str(path), str(image_root), str(rephrase_root), tmp_path / "packed"


def test_a_pack_reads_like_its_files(source):
    path, image_root, rephrase_root, out = source
    report = pack(path, image_root, rephrase_root, str(out))
    assert (report.num_records, report.num_problems, report.num_unreadable) == (7, 2, 0)
    before, after = list(read_records(path)), list(read_records(str(out)))
    names = ("file", "index", "edit_id", "task", "problem")
    assert [[getattr(item, name) for name in names] for item in before] == [
        [getattr(item, name) for name in names] for item in after
    ]
    plain = ImageReader.for_records(path, image_root, rephrase_root)
    packed = pickle.loads(pickle.dumps(ImageReader.for_records(str(out))))
    for old, new in zip(before, after, strict=True):
        if old.problem:
            assert old.fields == new.fields
            continue
        texts = probe_texts(new.fields, new.task)
        assert {name: item.prompt for name, item in texts.items()} == {
            name: item.prompt for name, item in probe_texts(old.fields, old.task).items()
        }
        for there, here in zip(request_images(old.fields), request_images(new.fields), strict=True):
            expected, got = plain.read(there.path, there.root), packed.read(here.path, here.root)
            assert got.key == expected.key
            np.testing.assert_array_equal(got.pixels, expected.pixels)
    assert after[5].edit_id == "chosen"


def test_equal_images_are_stored_once(source):
    path, image_root, rephrase_root, out = source
    report = pack(path, image_root, rephrase_root, str(out))
    # Five usable records with three images each; one m_loc path and one file content occur twice.
    assert report.num_images == 13
    stored = parquet.read_table(out / "images-00000.parquet")
    assert stored.num_rows == 13 and len(set(stored["key"].to_pylist())) == 13
    assert report.num_image_bytes == sum(len(data) for data in stored["data"].to_pylist())


def test_pack_takes_the_place_of_files_everywhere(source, tmp_path):
    path, image_root, rephrase_root, out = source
    pack(path, image_root, rephrase_root, str(out))
    reader = ImageReader.for_records(str(out))
    pool = Pool.sample(str(out), reader)
    plain = ImageReader(image_root, rephrase_root)
    plain_pool = Pool.sample(path, plain)
    requests = [
        build_request(list(read_records(where))[2], images, Supervision(), others)
        for where, images, others in ((str(out), reader, pool), (path, plain, plain_pool))
    ]
    keys = [[item.key for item in request.pictures()] for request in requests]
    assert keys[0] == keys[1] and requests[0].meta == requests[1].meta
    again = pack(out.as_uri(), None, None, str(tmp_path / "again"))
    assert again.num_images == 13
    assert [item.fields for item in read_records(str(tmp_path / "again"))] == [
        item.fields for item in read_records(str(out))
    ]


def test_unreadable_images_are_kept_as_the_reason(source, tmp_path):
    path, image_root, rephrase_root, out = source
    (tmp_path / "coco" / record(0)["image"]).write_bytes(b"broken")
    (tmp_path / "coco" / record(5)["m_loc"]).unlink()
    findings = []
    report = pack(path, image_root, rephrase_root, str(out), on_problem=findings.append)
    assert report.num_unreadable == 2 and (report.num_problems, report.num_records) == (4, 7)
    assert [(item.index, item.kind) for item in findings] == [
        (0, "not an image"),
        (3, "not an edit"),
        (5, "image not found"),
        (6, "wrong type"),
    ]
    reader = ImageReader.for_records(str(out))
    first = next(read_records(str(out)))
    with pytest.raises(
        ImageError, match=r"image 'val2014/COCO_val2014_000000000000.jpg': not an image of a known kind"
    ):
        reader.read(first.fields["image"])
    pack(str(out), None, None, str(tmp_path / "again"))
    assert next(read_records(str(tmp_path / "again"))).fields["image"] == first.fields["image"]


def test_one_image_is_read_without_its_file(source, monkeypatch):
    path, image_root, rephrase_root, out = source
    monkeypatch.setattr(pack_module, "ROW_GROUP_IMAGES", 2)
    monkeypatch.setattr(pack_module, "SHARD_BYTES", 6000)
    monkeypatch.setattr(pack_module, "RECORDS_PER_FILE", 4)
    report = pack(path, image_root, rephrase_root, str(out))
    files = sorted(out.glob("images-*.parquet"))
    assert len(files) > 1 and len(list(out.glob("records-*.parquet"))) == 2
    groups = [parquet.ParquetFile(file).metadata for file in files]
    sizes = [item.row_group(index).num_rows for item in groups for index in range(item.num_row_groups)]
    assert max(sizes) == 2 and sum(sizes) == report.num_images
    reader, plain = ImageReader.for_records(str(out)), ImageReader(image_root, rephrase_root)
    for old, new in zip(read_records(path), read_records(str(out)), strict=True):
        if not old.problem:
            assert reader.read(new.fields["m_loc"]).key == plain.read(old.fields["m_loc"]).key


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("pack:images-00000.parquet#99/0?x.png", "image 'x.png': .*row group 99"),
        ("pack:images-00000.parquet#0/999?x.png", "row 999"),
        ("pack:images-77777.parquet#0/0?x.png", "cannot be read"),
        ("pack:../images-00000.parquet#0/0?x.png", "is not a position in a pack"),
        ("pack:", "is not a position in a pack"),
    ],
)
def test_references_to_nowhere(source, reference, said):
    path, image_root, rephrase_root, out = source
    pack(path, image_root, rephrase_root, str(out))
    with pytest.raises(ImageError, match=said):
        ImageReader.for_records(str(out)).read(reference)
    with pytest.raises(ImageError, match="the records are in neither"):
        ImageReader(image_root).read(reference)


def test_limits_hold_in_a_pack_too(source):
    path, image_root, rephrase_root, out = source
    pack(path, image_root, rephrase_root, str(out))
    image = next(read_records(str(out))).fields["image"]
    for limit, said in (({"max_pixels": 10}, "24 x 18 pixels"), ({"max_bytes": 10}, "bytes are more")):
        with pytest.raises(ImageError, match=said):
            ImageReader.for_records(str(out), **limit).read(image)


def test_nothing_appears_unless_all_is_written(source, tmp_path):
    path, image_root, rephrase_root, out = source

    def interrupt(count):
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(path, image_root, rephrase_root, str(out), on_progress=interrupt)
    assert list(out.iterdir()) == []
    with pytest.raises(InputError, match="no finished pack"):
        list(read_records(str(out)))
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps([record(0), record(1)])[:-9])
    with pytest.raises(InputError, match="not valid JSON"):
        pack(str(cut), image_root, rephrase_root, str(out))
    assert list(out.iterdir()) == []
    counts = []
    pack(path, image_root, rephrase_root, str(out), on_progress=counts.append)
    assert counts == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(item.name for item in out.iterdir()) == ["images-00000.parquet", "pack.json", "records-00000.parquet"]
    with pytest.raises(InputError, match="already holds a pack"):
        pack(path, image_root, rephrase_root, str(out))


def test_wrong_places(source, tmp_path):
    path, image_root, rephrase_root, out = source
    with pytest.raises(InputError, match=r"data\.image_root: there is no folder"):
        pack(path, image_root + "x", rephrase_root, str(out))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written to"):
        pack(path, image_root, rephrase_root, str(tmp_path / "file" / "out"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"version": 9}', "has version 9"),
        ('{"version": 1, "records": ["../x.parquet"]}', "no file of records"),
        ('{"version": 1, "records": ["records-00009.parquet"]}', "records-00009.parquet cannot be read"),
    ],
)
def test_damaged_list_of_files(source, content, said):
    path, image_root, rephrase_root, out = source
    pack(path, image_root, rephrase_root, str(out))
    (out / "pack.json").write_text(content)
    with pytest.raises(InputError, match=said):
        list(read_records(str(out)))


def test_records_without_any_image(tmp_path):
    report = pack(
        str(write_array(tmp_path / "a.json", [record(0, alt="")])), str(tmp_path), None, str(tmp_path / "out")
    )
    assert report.num_images == 0
    assert [item.problem for item in read_records(str(tmp_path / "out"))] == ["not an edit: field 'alt' is empty"]
    pack(str(write_array(tmp_path / "b.json", [])), str(tmp_path), None, str(tmp_path / "none"))
    assert list(read_records(str(tmp_path / "none"))) == []


def test_memory_of_packing_does_not_grow_with_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "ROW_GROUP_BYTES", 200_000)
    peaks = []
    for count in (10, 60):
        folder = tmp_path / str(count)
        fields = [record(number) for number in range(count)]
        image_root, rephrase_root = write_images(folder, fields)
        for number, item in enumerate(fields):
            (image_root / item["image"]).write_bytes(encoded(picture(1000 + number, (150, 150)), "BMP"))
        path = str(write_array(folder / "a.json", fields))
        tracemalloc.start()
        pack(path, str(image_root), str(rephrase_root), str(folder / "out"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 50 * 67_500 / 4
