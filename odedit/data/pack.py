"""Packing of a file of records and its images into a few large Parquet files.

Thousands of small image files are slow to list and to open on shared storage. A pack holds each distinct image once,
by content, and is accepted wherever a file of records is. Records with a problem are copied as they are; an image that
cannot be read is replaced by the reason. Layout: `odedit.data.packed`.

Memory: one row group of images, and two short strings per distinct image path.
"""

from __future__ import annotations

import copy
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.data.check import Finding
from odedit.data.decoding import ImageError, decode
from odedit.data.fields import REPHRASE_PREFIX, ImageReference, has, image_reference
from odedit.data.images import KEY_LENGTH, MAX_BYTES, MAX_PIXELS, ImageReader, image_name
from odedit.data.packed import (
    IMAGES_SCHEMA,
    MANIFEST,
    PACK_VERSION,
    RECORDS_SCHEMA,
    original_path,
    packed_reference,
    unreadable_reference,
)
from odedit.data.records import RawRecord, read_records
from odedit.data.roots import root_of
from odedit.errors import InputError
from odedit.storage.location import Location, locate

ROW_GROUP_IMAGES = 16
ROW_GROUP_BYTES = 4 * 2**20
SHARD_BYTES = 256 * 2**20
RECORDS_PER_FILE = 5000


@dataclass
class PackReport:
    """Totals of a pack.

    Attributes:
        num_records: Number of records.
        num_problems: Number of records that cannot be used.
        num_images: Number of distinct images.
        num_image_bytes: Their total size.
        num_unreadable: Number of image paths that could not be read.
    """

    num_records: int = 0
    num_problems: int = 0
    num_images: int = 0
    num_image_bytes: int = 0
    num_unreadable: int = 0

    @property
    def is_useless(self) -> bool:
        """True when not one image could be read, which means that the roots are wrong."""
        return self.num_unreadable > 0 and self.num_images == 0


def pack(
    records_path: str,
    image_root: str | None,
    rephrase_root: str | None,
    out_dir: str,
    *,
    task: str = "auto",
    columns: Mapping[str, str] = MappingProxyType({}),
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    on_progress: Callable[[int], None] | None = None,
    on_problem: Callable[[Finding], None] | None = None,
) -> PackReport:
    """Writes a pack, unless none of its images can be read.

    Files are renamed to their final names when all are complete, the manifest last.

    Args:
        records_path: File of records; see `read_records`.
        image_root: Folder of `image` and `m_loc`; None: found, see `odedit.data.roots`.
        rephrase_root: Folder of `image_rephrase`; None: `image_root`.
        out_dir: Folder to write, local or an address; created if missing.
        task: Task of records without one, stored with every record; see `read_records`.
        columns: Columns of the file by field.
        max_pixels: Largest width x height; larger images are left out and reported.
        max_bytes: Largest image file; larger files are left out and reported.
        on_progress: Called after each record with the number of records packed so far.
        on_problem: Called for every bad record and every image that cannot be used.

    Raises:
        InputError: The records cannot be read, a root is missing, or `out_dir` already holds a pack.
    """
    root = root_of(records_path, image_root, columns, task)
    reader = ImageReader.for_records(records_path, root, rephrase_root, max_pixels=max_pixels, max_bytes=max_bytes)
    files = _Files(locate(out_dir, "out"))
    report = PackReport()
    images, rows = _ImageFiles(files, reader, report), _RecordFiles(files)
    try:
        for record in read_records(records_path, task=task, columns=columns):
            packed, findings = _pack_record(record, images)
            rows.add(packed)
            report.num_records += 1
            report.num_problems += bool(findings)
            if on_problem:
                for finding in findings:
                    on_problem(finding)
            if on_progress:
                on_progress(report.num_records)
        images.close()
        rows.close()
        if report.is_useless:
            files.remove()
        else:
            files.publish(report)
    except BaseException:
        images.abandon()
        files.remove()
        raise
    return report


def _pack_record(record: RawRecord, images: _ImageFiles) -> tuple[RawRecord, list[Finding]]:
    if record.problem:
        return record, [Finding.of(record, record.problem)]
    findings = []

    def replaced(reference: ImageReference, path: str) -> str:
        new, error = images.add(reference, path)
        if error is not None:
            findings.append(Finding.of(record, str(error), error.kind))
        return new

    fields: dict[str, Any] = copy.deepcopy(dict(record.fields))
    for name in ("image", "m_loc"):
        if has(fields, name):
            fields[name] = replaced(image_reference(fields[name]), fields[name])
    if has(fields, "image_rephrase"):
        path = fields["image_rephrase"]
        fields["image_rephrase"] = replaced(ImageReference(path.removeprefix(REPHRASE_PREFIX), "rephrase"), path)
    for group in ("probes", "held_out"):
        for entry in (fields.get(group) or {}).values():
            if entry.get("image") is not None:
                entry["image"] = replaced(image_reference(entry["image"]), entry["image"])
    return RawRecord(record.file, record.index, record.edit_id, record.task, fields), findings


class _Files:
    """Files of a pack in progress, under temporary names."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._mark = f".partial-{uuid.uuid4().hex[:8]}"
        self._names: list[str] = []
        try:
            if folder.child(MANIFEST).is_file():
                raise InputError(f"{folder.text}: already holds a pack. Name another folder, or delete this one first.")
            folder.filesystem.create_dir(folder.path, recursive=True)
        except OSError as error:
            raise InputError(f"{folder.text}: cannot be written to ({error}).") from error

    def writer(self, name: str, schema: pyarrow.Schema, **options: Any) -> parquet.ParquetWriter:
        self._names.append(name)
        path = self.folder.child(name + self._mark).path
        return parquet.ParquetWriter(path, schema, filesystem=self.folder.filesystem, **options)

    def publish(self, report: PackReport) -> None:
        records = sorted(name for name in self._names if name.startswith("records-"))
        manifest = {"version": PACK_VERSION, "records": records, **asdict(report)}
        with self.folder.filesystem.open_output_stream(self.folder.child(MANIFEST + self._mark).path) as stream:
            stream.write(json.dumps(manifest, indent=2).encode())
        self._names.append(MANIFEST)  # last: a folder without it is not a pack
        for name in self._names:
            self.folder.filesystem.move(self.folder.child(name + self._mark).path, self.folder.child(name).path)

    def remove(self) -> None:
        for name in self._names:
            for path in (self.folder.child(name + self._mark).path, self.folder.child(name).path):
                try:
                    self.folder.filesystem.delete_file(path)
                except OSError:
                    continue  # it was not written yet, or not renamed yet


class _ImageFiles:
    """Writes each distinct image once, and stores its position in the pack."""

    def __init__(self, files: _Files, reader: ImageReader, report: PackReport) -> None:
        self._files, self._reader, self._report = files, reader, report
        self._writer: parquet.ParquetWriter | None = None
        self._num_files = self._num_groups = self._file_bytes = self._group_bytes = 0
        self._group: list[dict[str, Any]] = []
        self._position_of_key: dict[str, tuple[str, int, int]] = {}
        self._key_of_image: dict[ImageReference, str | ImageError] = {}

    def add(self, reference: ImageReference, path: str) -> tuple[str, ImageError | None]:
        """The image's reference in the packed record, and the error if it cannot be used."""
        if reference not in self._key_of_image:
            self._key_of_image[reference] = self._store(reference)
        key = self._key_of_image[reference]
        if isinstance(key, ImageError):
            return unreadable_reference(str(key)), key
        return packed_reference(*self._position_of_key[key], original_path(path)), None

    def _store(self, reference: ImageReference) -> str | ImageError:
        try:
            data = self._reader.read_bytes(reference.path, reference.root)
            key = hashlib.sha256(data).hexdigest()[:KEY_LENGTH]
            if key not in self._position_of_key:
                decode(data, image_name(reference.path), self._reader.max_pixels)
                self._position_of_key[key] = self._append(key, original_path(reference.path), data)
        except ImageError as error:
            self._report.num_unreadable += 1
            return error.with_traceback(None)  # the traceback would keep the image in memory
        return key

    def _append(self, key: str, name: str, data: bytes) -> tuple[str, int, int]:
        if self._writer is None:
            # Image files are compressed already, and no reader filters by their bytes.
            self._writer = self._files.writer(
                self._file_name, IMAGES_SCHEMA, compression="none", use_dictionary=False, write_statistics=False
            )
        position = (self._file_name, self._num_groups, len(self._group))
        self._group.append({"key": key, "name": name, "data": data})
        self._group_bytes += len(data)
        self._report.num_images += 1
        self._report.num_image_bytes += len(data)
        if len(self._group) >= ROW_GROUP_IMAGES or self._group_bytes >= ROW_GROUP_BYTES:
            self._write_group()
        return position

    @property
    def _file_name(self) -> str:
        return f"images-{self._num_files:05d}.parquet"

    def _write_group(self) -> None:
        if self._writer is not None and self._group:
            table = pyarrow.Table.from_pylist(self._group, schema=IMAGES_SCHEMA)
            self._writer.write_table(table, row_group_size=len(self._group))
            self._num_groups += 1
            self._file_bytes += self._group_bytes
            self._group, self._group_bytes = [], 0
            if self._file_bytes >= SHARD_BYTES:
                self.close()

    def close(self) -> None:
        if self._group:
            self._write_group()
        self.abandon()

    def abandon(self) -> None:
        """Closes the current file without writing the last row group."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._num_files += 1
            self._num_groups = self._file_bytes = 0


class _RecordFiles:
    """Writes records in order, `RECORDS_PER_FILE` per file."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._rows: list[dict[str, Any]] = []
        self._num_files = 0

    def add(self, record: RawRecord) -> None:
        self._rows.append(record.to_row())
        if len(self._rows) >= RECORDS_PER_FILE:
            self.close()

    def close(self) -> None:
        if self._rows:
            table = pyarrow.Table.from_pylist(self._rows, schema=RECORDS_SCHEMA)
            with self._files.writer(f"records-{self._num_files:05d}.parquet", RECORDS_SCHEMA) as writer:
                writer.write_table(table, row_group_size=500)
            self._rows, self._num_files = [], self._num_files + 1
