"""Tables as spreadsheets export them, and pictures as people name them: read, or a sentence says what to do."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from odedit.data.check import CheckReport, check_records
from odedit.data.names import renamed
from odedit.errors import InputError
from tests.support.mmedit_files import encoded, picture

HEADER = "Image;Question;Answer"
NAMES = ["1.jpg", "2.jpg"]
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99


@pytest.mark.parametrize("names", [("Answer", "answer"), ("answer", "Answer"), ("Answer", "alt"), ("alt", "Answer")])
def test_a_name_as_listed_comes_before_the_same_in_another_case(names: tuple[str, str]) -> None:
    record = {name: "listed" if name.islower() else "other" for name in names}
    assert renamed({"image": "a.png", "Question": "what?"} | record, {})["alt"] == "listed"


def table(names: list[str], header: str = HEADER, tail: str = "") -> str:
    rows = [f"{name};Was h\u00e4ngt hier?;Gr\u00fcn {number}{tail}" for number, name in enumerate(names)]
    return "\r\n".join([header, *rows, ""])


def check(folder: Path, content: str | bytes, files: list[str], name: str = "records.csv") -> list[str]:
    """What the check says about a table beside pictures."""
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(HEIC if file.endswith(".HEIC") else encoded(picture(number), "JPEG"))
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    report = CheckReport()
    findings = [finding.reason for finding in check_records(str(folder / name), None, None, report)]
    assert report.num_usable + len(findings) == report.num_records
    return [*findings, *report.lines()]


@pytest.mark.parametrize(
    "content",
    [
        table(NAMES),
        table(NAMES).encode("utf-8-sig"),
        table(NAMES).encode("utf-16"),
        table(NAMES) + ";;\r\n;;\r\n\r\n",
        table(NAMES, HEADER + ";;", ";;;"),
        "sep=;\r\n" + table(NAMES),
        "sep=|\r\n" + table(NAMES).replace(";", "|"),
        table(NAMES, "IMAGE;question; Answer ;Old Answer", ";Rot"),
    ],
    ids=["plain", "mark", "utf-16", "empty lines", "empty cells", "sep", "sep |", "names"],
)
def test_tables_that_are_read(tmp_path: Path, content: str | bytes) -> None:
    said = check(tmp_path, content, NAMES)
    assert "Shared: 2 records, 1 different question, 2 different pictures." in said


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("form_there", ["NFC", "NFD"])
def test_names_with_umlauts_are_read_in_both_forms(tmp_path: Path, form: str, form_there: str) -> None:
    name = "pictures/Br\u00fccke.JPG"
    said = check(tmp_path, table([unicodedata.normalize(form, name)]), [unicodedata.normalize(form_there, name)])
    assert any(line.startswith("Scored: rel 1 of 1") for line in said)


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("1.jpg", "pictures/1.JPG", "is not under data.image_root ({}/pictures'). The file there is named '1.JPG'"),
        ("1", "1.jpg", "The file there is named '1.jpg': write it so."),
        ("1.jpg ", "1.jpg", "The file there is named '1.jpg': write it so."),
        ("pictures\\1.jpg", "pictures/1.jpg", "with forward slashes, such as 'pictures/1.jpg'."),
        ("C:\\Users\\Anna\\1.jpg", "1.jpg", "under data.image_root ({}'), with forward slashes, such as '1.jpg'."),
        ("file:///home/anna/1.jpg", "1.jpg", "such as '1.jpg'."),
        ("..\\..\\1.jpg", "1.jpg", "such as '1.jpg'."),
        ("1.HEIC", "1.HEIC", "not an image of a known kind. Allowed: PNG, JPEG, WEBP, GIF, BMP, TIFF. Save it as"),
    ],
)  # fmt: skip
def test_names_of_pictures_that_need_a_change(tmp_path: Path, name: str, file: str, said: str) -> None:
    assert said.format(f"'{tmp_path}") in check(tmp_path, table([name]), [file])[0]


def test_pictures_in_two_folders_are_named_from_the_one_above(tmp_path: Path) -> None:
    files = ["a/1.jpg", "b/2.jpg"]
    said = check(tmp_path, table(NAMES), files)
    assert said[0].startswith("image '2.jpg' is not under")
    assert any("Pictures not found: set it to a folder that holds all of them, and name each" in line for line in said)
    assert not any("not found" in line for line in check(tmp_path, table(files), files))


@pytest.mark.parametrize("header", ["Bild;Frage;Antwort", "0.jpg;Was?;Gr\u00fcn"])
def test_a_table_with_other_names_or_none_says_how_to_name_them(tmp_path: Path, header: str) -> None:
    said = check(tmp_path, table(NAMES, header), NAMES)
    assert said[0] == "missing fields: 'image', 'question' and 'answer' are not there"
    assert said[-1].startswith("Fields have names, in a table those of its first line. To name one otherwise: --column")


def test_one_byte_encodings_are_named(tmp_path: Path) -> None:
    said = check(tmp_path, table(NAMES).encode("cp1252"), NAMES)
    assert said[0].startswith("invalid text: field 'Question' holds bytes that are no UTF-8")


def test_a_column_given_by_name_comes_before_the_same_name_in_another_case(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,question,Answer,label\n1.jpg,what?,a dog,a cat\n")
    report = CheckReport()
    columns = {"old_answer": "Answer", "answer": "label"}
    assert not list(check_records(str(tmp_path / "a.csv"), None, None, report, read_images=False, columns=columns))
    assert report.given["pred"] == report.given["alt"] == 1 and not report.unread


def test_a_workbook_is_to_be_saved_as_a_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Save a spreadsheet as CSV, in UTF-8"):
        check(tmp_path, b"PK", [], "records.xlsx")
