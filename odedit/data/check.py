"""Validation of a file of records before a run: which records would be skipped, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from odedit.data.fields import request_images
from odedit.data.images import MAX_BYTES, MAX_PIXELS, ImageError, ImageReader
from odedit.data.records import RawRecord, read_records


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
class CheckReport:
    """Totals of a check.

    Attributes:
        num_records: Number of records read.
        num_usable: Number of records that a run would edit.
        skipped: Number of unusable records by kind of problem.
    """

    num_records: int = 0
    num_usable: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def check_records(
    records_path: str,
    image_root: str | None,
    rephrase_root: str | None,
    report: CheckReport,
    *,
    task: str = "auto",
    read_images: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Finding]:
    """Yields every record that would be skipped.

    Args:
        records_path: File of records or packed folder; see `read_records`.
        image_root: Folder of `image` and `m_loc`; unused if `read_images` is False.
        rephrase_root: Folder of `image_rephrase`; None: `image_root`.
        report: Totals; complete when the iterator is exhausted.
        task: Task of records without one; see `read_records`.
        read_images: Also read and decode every image, about 10 ms each.
        max_pixels: Largest width x height of an image.
        max_bytes: Largest image file.
        on_progress: Called after each record with the number of records checked so far.

    Raises:
        InputError: The records cannot be read, or a root does not exist.
    """
    reader = None
    if read_images:
        reader = ImageReader.for_records(
            records_path, image_root, rephrase_root, max_pixels=max_pixels, max_bytes=max_bytes
        )
    for record in read_records(records_path, task=task):
        finding = _finding(record, reader)
        report.num_records += 1
        if finding is None:
            report.num_usable += 1
        else:
            report.skipped[finding.kind] += 1
            yield finding
        if on_progress:
            on_progress(report.num_records)


def _finding(record: RawRecord, reader: ImageReader | None) -> Finding | None:
    """The problem of a record, or None. All images are tried, so that one check reports every bad one."""
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
