import pytest

from odedit.data.check import CheckReport, check_records
from odedit.data.pack import pack
from odedit.errors import InputError
from tests.support.mmedit_files import record, write_array, write_images


@pytest.fixture
def source(tmp_path):
    fields = [record(number) for number in range(5)]
    image_root, rephrase_root = write_images(tmp_path, fields)
    (image_root / fields[1]["image"]).write_bytes(b"broken")
    (image_root / fields[1]["m_loc"]).unlink()
    fields[2]["alt"] = ""
    fields[4]["loc"] = ""
    return str(write_array(tmp_path / "vqa_eval.json", fields)), str(image_root), str(rephrase_root)


def test_every_bad_record_is_found_and_counted(source):
    report, counts = CheckReport(), []
    findings = list(check_records(*source, report, on_progress=counts.append))
    assert [(item.index, item.kind) for item in findings] == [
        (1, "not an image"),
        (2, "not an edit"),
        (4, "empty field"),
    ]
    assert str(findings[1]) == "vqa_eval.json, record 2 (vqa_eval-000002): not an edit: field 'alt' is empty"
    assert "000000000001.jpg': not an image" in findings[0].reason
    assert "000000900001.jpg' is not under" in findings[0].reason
    assert (report.num_records, report.num_usable) == (5, 2)
    assert dict(report.skipped) == {"not an image": 1, "not an edit": 1, "empty field": 1}
    assert counts == [1, 2, 3, 4, 5]


def test_without_images_no_root_is_needed(source):
    report = CheckReport()
    findings = list(check_records(source[0], None, None, report, read_images=False))
    assert [item.index for item in findings] == [2, 4] and report.num_usable == 3


def test_a_pack_is_checked_like_its_files(source, tmp_path):
    pack(*source, str(tmp_path / "out"))
    report = CheckReport()
    findings = list(check_records(str(tmp_path / "out"), None, None, report))
    assert [item.index for item in findings] == [1, 2, 4]
    assert [item.reason for item in findings] == [item.reason for item in check_records(*source, CheckReport())]


def test_wrong_roots_are_said_once(source):
    with pytest.raises(InputError, match="image_root"):
        list(check_records(source[0], source[1] + "x", source[2], CheckReport()))
