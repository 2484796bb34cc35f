"""Layout and reading of a packed folder.

    pack.json                  manifest, written last: a folder without it is not a pack
    records-00000.parquet      one row per record, `RawRecord.to_row`
    images-00000.parquet       one row per distinct image: key, name, data

A packed record refers to an image by `pack:<file>#<row group>/<row>?<original path>`. A row group holds a few images,
so an image is read without the rest of its file, and without an index in memory. An image that could not be packed is
`pack:unreadable#<reason>`; reading it raises that error.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.data.cells import cell_name, is_cell_reference
from odedit.data.tables import shards
from odedit.errors import InputError
from odedit.storage.location import Location
from odedit.storage.retries import is_transient

PACK_VERSION = 1
MANIFEST = "pack.json"
RECORDS_SCHEMA = pyarrow.schema(
    [
        ("file", pyarrow.string()),
        ("index", pyarrow.int64()),
        ("edit_id", pyarrow.string()),
        ("task", pyarrow.string()),
        ("fields", pyarrow.string()),
        ("problem", pyarrow.string()),
    ]
)
IMAGES_SCHEMA = pyarrow.schema([("key", pyarrow.string()), ("name", pyarrow.string()), ("data", pyarrow.binary())])

_PREFIX = "pack:"
_UNREADABLE = "pack:unreadable#"
_REFERENCE = re.compile(r"pack:(images-\d{5,}\.parquet)#(\d{1,9})/(\d{1,9})\?(.*)", re.DOTALL)
_OPEN_FILES = 8
_ROW_GROUPS_KEPT = 4  # images of one record are mostly in adjacent row groups


def is_pack_reference(path: str) -> bool:
    return path.startswith(_PREFIX)


def is_embedded_reference(path: str) -> bool:
    """Whether a path is a position in a packed folder or in a table."""
    return is_pack_reference(path) or is_cell_reference(path)


def packed_reference(file: str, row_group: int, row: int, path: str) -> str:
    """Reference to an image of a pack; `path` is the image's original path."""
    return f"{_PREFIX}{file}#{row_group}/{row}?{path}"


def unreadable_reference(reason: str) -> str:
    """Reference to an image that could not be packed, with the reason."""
    return _UNREADABLE + reason


def unreadable_reason(reference: str) -> str | None:
    return reference.removeprefix(_UNREADABLE) if reference.startswith(_UNREADABLE) else None


def original_path(path: str) -> str:
    """The path of an image before packing, or the digest and name of a picture in a table; a path as it is."""
    match = _REFERENCE.fullmatch(path)
    return match[4] if match else cell_name(path) or path


def is_pack(location: Location) -> bool:
    """True for a packed folder, False for files of records, also in a folder. Raises InputError for other folders."""
    try:
        if not location.is_folder():
            return False
        if location.child(MANIFEST).is_file():
            return True
        if shards(location):
            return False
    except OSError as error:
        raise InputError(f"{location.text}: cannot be accessed ({error}).") from error
    raise InputError(
        f"{location.text}: is a folder without {MANIFEST}, so no finished pack, and without files that end with "
        ".parquet or .arrow. Name a file of records (.csv, .json, .jsonl, .parquet), or a folder written by "
        "`odedit data pack`."
    )


def read_manifest(location: Location) -> dict[str, Any]:
    """Manifest of a pack. Raises InputError if it is damaged or of another version."""
    try:
        with location.child(MANIFEST).open() as stream:
            manifest = json.loads(stream.read())
        if manifest["version"] != PACK_VERSION:
            raise InputError(
                f"{location.text}: the pack has version {manifest['version']!r}, this program reads {PACK_VERSION}. "
                "Pack the records again."
            )
        if not all(re.fullmatch(r"records-\d+\.parquet", name) for name in manifest["records"]):
            raise ValueError("it lists a file that is no file of records")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{location.text}: {MANIFEST} cannot be read ({error}). Pack the records again.") from error
    return dict(manifest)


def read_packed_rows(location: Location) -> Iterator[dict[str, Any]]:
    """Rows of a pack's records in order, read in batches."""
    for name in read_manifest(location)["records"]:
        try:
            with location.child(name).open() as stream, parquet.ParquetFile(stream) as file:
                for batch in file.iter_batches(batch_size=256, columns=RECORDS_SCHEMA.names):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise InputError(f"{location.text}: {name} cannot be read ({error}). Pack the records again.") from error


class PackedImages:
    """Reads single images of a pack, with LRU caches of open files and of row groups."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._files: OrderedDict[str, parquet.ParquetFile] = OrderedDict()
        self._row_groups: OrderedDict[tuple[str, int], pyarrow.ChunkedArray] = OrderedDict()

    @property
    def is_local(self) -> bool:
        return self._location.is_local

    def __getstate__(self) -> dict[str, Any]:
        return {"_location": self._location, "_files": OrderedDict(), "_row_groups": OrderedDict()}

    def read(self, reference: str) -> bytes:
        """The bytes of one image.

        Raises:
            ValueError: The pack has no such position, or is damaged.
            OSError: Transient error of the storage.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise ValueError(f"{reference[:80]!r} is not a position in a pack (pack:<file>#<row group>/<row>?<path>).")
        file, row_group, row = match[1], int(match[2]), int(match[3])
        try:
            column = self._row_group(file, row_group)
            return bytes(column[row].as_py())
        except OSError as error:
            if is_transient(error):
                raise
            raise self._unreadable(file, row_group, row, error) from error
        except (pyarrow.ArrowException, IndexError, KeyError, TypeError) as error:
            raise self._unreadable(file, row_group, row, error) from error

    def _unreadable(self, file: str, row_group: int, row: int, error: Exception) -> ValueError:
        return ValueError(
            f"{file}, row group {row_group}, row {row} of the pack {self._location.text!r} cannot be read ({error})."
        )

    def _row_group(self, file: str, row_group: int) -> pyarrow.ChunkedArray:
        key = (file, row_group)
        if key not in self._row_groups:
            opened = self._file(file)
            if row_group >= opened.num_row_groups:
                raise IndexError(f"the file has {opened.num_row_groups} row groups")
            self._row_groups[key] = opened.read_row_group(row_group, columns=["data"], use_threads=False)["data"]
            _drop_oldest(self._row_groups, _ROW_GROUPS_KEPT)
        self._row_groups.move_to_end(key)
        return self._row_groups[key]

    def _file(self, name: str) -> parquet.ParquetFile:
        if name not in self._files:
            self._files[name] = parquet.ParquetFile(self._location.child(name).open())
            for dropped in _drop_oldest(self._files, _OPEN_FILES):
                dropped.close(force=True)
        self._files.move_to_end(name)
        return self._files[name]


def _drop_oldest(kept: OrderedDict[Any, Any], size: int) -> list[Any]:
    return [kept.popitem(last=False)[1] for _ in range(len(kept) - size)]
