"""Looks through a file of records before a run and says what would be skipped, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from odedit.data.fields import request_images
from odedit.data.images import MAX_BYTES, MAX_PIXELS, ImageError, ImageReader
from odedit.data.records import RawRecord, read_records


@dataclass(frozen=True)
class Finding:
    """One record that would be skipped, or one image of it."""

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
    """Totals of a check. `skipped` counts records by kind of problem, and sums to what is not usable."""

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
    """Yields every record that would be skipped; afterwards `report` holds the totals.

    Args:
        records_path: What `read_records` reads.
        image_root: As for `ImageReader`; not looked at without `read_images`.
        rephrase_root: As for `ImageReader`.
        report: Filled while the findings are taken.
        task: As for `read_records`.
        read_images: Also read and decode every image. Some ten milliseconds for each.
        max_pixels: As for `ImageReader`.
        max_bytes: As for `ImageReader`.
        on_progress: Called with the number of records done after each.

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
    """What is wrong with a record; all of its images are tried, so that one check finds them all."""
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
