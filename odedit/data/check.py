"""Check of a file of records before a run: which records would be skipped and why, and what the others hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from odedit.data.fields import FIELDS, REQUIRED, has, probe_texts, request_images, shorten
from odedit.data.ids import Digests
from odedit.data.images import MAX_BYTES, MAX_PIXELS, ImageError, ImageReader
from odedit.data.layouts import layout_of
from odedit.data.names import NAMED, nearest, unread
from odedit.data.packed import is_pack
from odedit.data.readers import read_entries
from odedit.data.records import RawRecord, read_records
from odedit.data.roots import root_of
from odedit.errors import counted
from odedit.storage.location import locate

_LOOKED_AT = 200
"""Records whose keys show the layout of a file."""
_SHOWN = 8
_KEYS = 1000
"""Most keys without a reader that are counted."""
_OF_EACH_KIND = 10


@dataclass(frozen=True)
class Finding:
    """A record that would be skipped, or one of its images that cannot be used."""

    where: str
    index: int
    edit_id: str
    reason: str
    kind: str

    @classmethod
    def of(cls, record: RawRecord, reason: str, kind: str = "") -> Finding:
        return cls(record.where, record.index, record.edit_id, reason, kind or reason.split(":", 1)[0])

    def __str__(self) -> str:
        return f"{self.where} ({self.edit_id}): {self.reason}"


@dataclass
class FirstFindings:
    """Choice of the findings that are printed: the first ten of each kind, or all.

    Attributes:
        counts: Number of findings by kind.
    """

    prints_all: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def takes(self, finding: Finding) -> bool:
        """Counts a finding; whether it is printed."""
        self.counts[finding.kind] += 1
        return self.prints_all or self.counts[finding.kind] <= _OF_EACH_KIND

    def rest(self) -> str:
        """Number of the findings that are not printed by kind; empty if there is none."""
        hidden = {kind: count - _OF_EACH_KIND for kind, count in self.counts.most_common() if count > _OF_EACH_KIND}
        return "" if self.prints_all else ", ".join(f"{count} {kind}" for kind, count in hidden.items())


@dataclass
class CheckReport:
    """Totals of a check.

    Attributes:
        num_records: Number of records read.
        num_usable: Number of records that a run would edit.
        skipped: Number of unusable records by kind of problem.
        layouts: Number of the first records by layout.
        image_root: Folder of the pictures; None: they are packed, or were not looked for.
        given: Number of records by field that they give, and by probe.
        unread: Number of records by key without a reader, of the first 1,000 such keys.
        num_pictures, num_questions: Number of distinct pictures and questions.
        repeated: Number of records that repeat an earlier one: its picture, question and answer.
        contradicting: Number of records that ask an earlier record's question about its picture for another answer.
        first_contradicting: Name of the first of these.
    """

    num_records: int = 0
    num_usable: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    image_root: str | None = None
    given: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    num_pictures: int = 0
    num_questions: int = 0
    repeated: int = 0
    contradicting: int = 0
    first_contradicting: str = ""
    notes: list[str] = field(default_factory=list)
    _pictures: Digests = field(default_factory=Digests, repr=False)
    _questions: Digests = field(default_factory=Digests, repr=False)
    _asked: Digests = field(default_factory=Digests, repr=False)
    _answered: Digests = field(default_factory=Digests, repr=False)

    def add_unread(self, keys: Iterable[str]) -> None:
        """Counts those keys of one record that have no reader."""
        self.unread.update(key for key in keys if key in self.unread or len(self.unread) < _KEYS)

    def add(self, record: RawRecord) -> None:
        """Adds a usable record. Pictures are told apart by their paths."""
        image, question, answer = (str(record.fields[name]) for name in REQUIRED)
        question, answer = (" ".join(text.casefold().split()) for text in (question, answer))
        self.given.update(name for name in FIELDS if has(record.fields, name))
        probes = {re.sub(r"_\d+$", "", name) for name in probe_texts(record.fields, record.task)}
        self.given.update(probes - _SCORED_BY)
        self.num_pictures += self._pictures.add(image)
        self.num_questions += self._questions.add(question)
        is_new = self._answered.add("\0".join((image, question, answer)))
        if self._asked.add("\0".join((image, question))):
            return
        self.repeated += not is_new
        self.contradicting += is_new
        if is_new and not self.first_contradicting:
            self.first_contradicting = f"{record.where} ({record.edit_id})"

    def lines(self) -> Iterator[str]:
        """What the file holds, in sentences."""
        if self.layouts:
            yield f"Layout: {', '.join(self.layouts)}." + "".join(f" {note}" for note in self.notes)
        if self.image_root is not None:
            hint = (
                " Pictures not found: set it to a folder that holds all of them, and name each by its path from there."
                if self.skipped["image not found"]
                else ""
            )
            yield f"Pictures: under {self.image_root} (data.image_root).{hint}"
        if self.unread:
            shown = self.unread.most_common(_SHOWN)
            hints = {key: f" (did you mean {near!r}?)" if (near := nearest(key)) else "" for key, _ in shown}
            named = [f"{shorten(key)!r}{hints[key]} in {count}" for key, count in shown]
            beyond = "at least " if len(self.unread) == _KEYS else ""
            more = f", and {beyond}{len(self.unread) - _SHOWN} more" if len(self.unread) > _SHOWN else ""
            yield f"Fields that nobody reads: {', '.join(named)}{more}."
            if self.skipped["missing field"] or self.skipped["missing fields"]:
                yield (
                    "Fields have names, in a table those of its first line. To name one otherwise: --column FIELD=NAME "
                    "(data.columns), such as --column answer=Label."
                )
        if not self.num_usable:
            return
        total = self.num_usable
        yield (
            f"Shared: {counted(total, 'record')}, {counted(self.num_questions, 'different question')}, "
            f"{counted(self.num_pictures, 'different picture')}."
        )
        if self.repeated:
            yield f"Repeated: {self.repeated} have the picture, question and answer of an earlier record."
        if self.contradicting:
            yield (
                f"Contradicting: {self.contradicting} ask an earlier record's question about its picture for another "
                f"answer, the first {self.first_contradicting}. One model cannot give both: "
                "`odedit commit` refuses them, unless commit.on_conflict says which to take, first or last."
            )
        scored = [f"{metric} {self.given[name]}" for name, metric in _SCORED.items() if self.given[name]]
        scored += [f"{name} {self.given[name]}" for name in sorted(self.given) if name not in FIELDS]
        yield f"Scored: rel {total}{''.join(f', {text}' for text in scored)} of {total}."
        absent = [f"{text} {total - self.given[name]}" for name, text in _MADE.items() if self.given[name] < total]
        if absent:
            yield f"Made or asked where it is read, since it is not given: {', '.join(absent)} of {total}."


_SCORED = {"rephrase": "t_gen", "image_rephrase": "m_gen", "loc": "t_loc", "m_loc": "m_loc"}
_SCORED_BY = frozenset(_SCORED.values())
_MADE = {"pred": "old_answer", "rephrase": "rephrase", "image_rephrase": "image_rephrase"}
"""Name of what a run makes in place of a field."""


def check_records(
    records_path: str,
    image_root: str | None,
    rephrase_root: str | None,
    report: CheckReport,
    *,
    task: str = "auto",
    read_images: bool = True,
    columns: Mapping[str, str] = MappingProxyType({}),
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Finding]:
    """Yields every record that would be skipped.

    Memory does not grow with the file: what tells repeated and contradictory records lies in temporary files, some
    80 bytes per record in all.

    Args:
        records_path: File of records or packed folder; see `read_records`.
        image_root: Folder of `image` and `m_loc`, unused if `read_images` is False; None: found, see `root_of`.
        rephrase_root: Folder of `image_rephrase`; None: `image_root`.
        report: Totals; complete when the iterator is exhausted.
        task: Task of records without one; see `read_records`.
        read_images: Also read and decode every image, about 10 ms each.
        columns: Columns of the file by field.
        max_pixels: Largest width x height of an image.
        max_bytes: Largest image file.
        on_progress: Called after each record with the number of records checked so far.

    Raises:
        InputError: The records cannot be read, or a root does not exist.
    """
    reader = None
    if read_images:
        report.image_root = root_of(records_path, image_root, columns, task)
        reader = ImageReader.for_records(
            records_path, report.image_root, rephrase_root, max_pixels=max_pixels, max_bytes=max_bytes
        )
    read_by_layout = _look_at(records_path, report)
    for record in read_records(records_path, task=task, columns=columns):
        if "unparsed" not in record.fields:
            report.add_unread(unread(record.fields, columns, (NAMED, *read_by_layout(record))))
        finding = _finding(record, reader)
        report.num_records += 1
        if finding is None:
            report.num_usable += 1
            report.add(record)
        else:
            report.skipped[finding.kind] += 1
            yield finding
        if on_progress:
            on_progress(report.num_records)


def _look_at(path: str, report: CheckReport) -> Callable[[RawRecord], list[str]]:
    """Counts the layouts of the first records; returns a function to the keys of a record that its layout reads."""
    location = locate(path, "data.path")
    layouts = {}
    if not is_pack(location):
        for entry in islice(read_entries(location), _LOOKED_AT):
            if isinstance(entry.value, dict):
                layout = layout_of(entry.value)
                layouts[layout.name] = layout
                report.layouts[layout.name] += 1
    report.notes += [f"In {layout.name}, {layout.note}." for layout in layouts.values() if layout.note]
    return lambda record: [key for layout in layouts.values() for key in layout.reads(map(str, record.fields))]


def _finding(record: RawRecord, reader: ImageReader | None) -> Finding | None:
    """The problem of a record, or None. All images are tried, so that one check reports all bad images."""
    if record.problem:
        return Finding.of(record, record.problem)
    if reader is None:
        return None
    errors = []
    for reference in request_images(record.fields):
        try:
            reader.read(reference.path, reference.root)
        except ImageError as error:
            errors.append(error)
    if not errors:
        return None
    return Finding.of(record, " ".join(str(error) for error in errors), errors[0].kind)
