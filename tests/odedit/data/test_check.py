import json
import random
from collections import Counter

import pytest

from odedit.data.check import CheckReport, FirstFindings, check_records
from odedit.data.ids import Digests
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


def plain_counts(values):
    """Distinct pictures and questions, repeated and contradicting records and the first of those, by sets."""
    asked, answered, repeated, contradicting = set(), set(), 0, []
    for index, value in enumerate(values):
        question = (value["image"], value["question"].casefold())
        answer = (*question, value["answer"].casefold())
        repeated += answer in answered
        contradicting += [index] if question in asked and answer not in answered else []
        asked.add(question)
        answered.add(answer)
    pictures, questions = len({key[0] for key in asked}), len({key[1] for key in asked})
    return pictures, questions, repeated, len(contradicting), contradicting[0]


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_sets_in_memory(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(Digests.__init__, "__defaults__", (32,))
    rng = random.Random(seed)
    values = [
        {
            "image": f"{rng.randrange(40)}.png",
            "question": rng.choice("Ww") + f"hat is {rng.randrange(20)}?",
            "answer": rng.choice("Dd") + f"og {rng.randrange(3)}",
        }
        for _ in range(1000)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)))
    report = CheckReport()
    assert not list(check_records(str(tmp_path / "a.jsonl"), None, None, report, read_images=False))
    counts = (report.num_pictures, report.num_questions, report.repeated, report.contradicting)
    assert (*counts, int(report.first_contradicting.split()[2])) == plain_counts(values)


def test_the_first_findings_of_each_kind_are_printed_and_the_others_counted(tmp_path):
    values = [{"image": "a.png", "question": "what?", "answer": ""}] * 25 + [{}] * 3 + [{"image": 1}] * 11
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)))
    findings = list(check_records(str(tmp_path / "a.jsonl"), None, None, CheckReport(), read_images=False))
    first, every = FirstFindings(), FirstFindings(prints_all=True)
    assert Counter(item.kind for item in findings if first.takes(item)) == {"not an edit": 10, "missing fields": 10}
    assert first.rest() == "15 not an edit, 4 missing fields"
    assert all(every.takes(item) for item in findings) and every.rest() == ""
    assert first.counts == every.counts == {"not an edit": 25, "missing fields": 14}


def test_keys_that_nobody_reads_are_counted_up_to_a_thousand(tmp_path):
    values = [{"image": "a.png", "question": "what?", "answer": "x", f"key {n}": 1, "often": 1} for n in range(1200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)))
    report = CheckReport()
    list(check_records(str(tmp_path / "a.jsonl"), None, None, report, read_images=False))
    assert len(report.unread) == 1000 and report.unread["often"] == 1200
    assert any("'often' in 1200" in line and "and at least 992 more." in line for line in report.lines())
