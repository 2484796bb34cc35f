"""Pictures that lie in the rows of a table, as data sets of Hugging Face hold them.

A record refers to such a picture by `cell:<file>#<row group>/<row>/<column>?<digest>/<name>`, so that no picture is
copied. The digest is that of the picture: the same picture has the same name in messages and ids wherever it lies.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

import pyarrow
from pyarrow import parquet

from odedit.storage.location import Location

_PREFIX = "cell:"
_REFERENCE = re.compile(r"cell:([^#?/]+)#(\d{1,9})/(\d{1,9})/([^/?]*)\?(.*)", re.DOTALL)
_DIGITS = 16
_GROUPS_KEPT = 2


def is_cell_reference(path: str) -> bool:
    return path.startswith(_PREFIX)


def cell_name(reference: str) -> str | None:
    """Digest and name of the picture; None for anything but a reference."""
    match = _REFERENCE.fullmatch(reference)
    return match[5] if match else None


def with_references(value: Any, file: str, group: int, row: int, column: str) -> Any:
    """The value of a cell with a reference in place of each picture's bytes, and the path in place of a bare path."""
    if isinstance(value, list):
        return [with_references(item, file, group, row, column) for item in value]
    content, name = picture_of(value)
    if content is None:
        is_bare = isinstance(value, dict) and value.keys() <= {"bytes", "path"} and isinstance(value.get("path"), str)
        return value["path"] if is_bare else value
    digest = hashlib.sha256(content).hexdigest()[:_DIGITS]
    where = f"{quote(file, safe='')}#{group}/{row}/{quote(column, safe='')}"
    return f"{_PREFIX}{where}?{digest}/{name}"


def picture_of(value: Any) -> tuple[bytes | None, str]:
    """Bytes and name of the picture in a cell, or in a list with one: bytes, or a struct of `bytes` and `path`."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        return value, ""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value["bytes"], str(value.get("path") or "")
    return None, ""


class CellImages:
    """Reads single pictures of a table: a Parquet file, a folder of them, or a data set saved on disk."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._groups: OrderedDict[tuple[str, int, str], pyarrow.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_location": self._location, "_groups": OrderedDict()}

    @property
    def is_local(self) -> bool:
        return self._location.is_local

    def read(self, reference: str) -> bytes:
        """The bytes of one picture.

        Raises:
            ValueError: The table has no such cell, or the cell holds no picture, or another one.
            OSError: The file cannot be read.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise ValueError(f"{reference[:80]!r} is not a cell of a table (cell:<file>#<row group>/<row>/<column>).")
        file, group, row, column = unquote(match[1]), int(match[2]), int(match[3]), unquote(match[4])
        where = f"{file}, row group {group}, row {row}, column {column!r}"
        if "/" in file or file in ("..", ".", ""):
            raise ValueError(f"{where}: the file is not in {self._location.text!r}.")
        try:
            content, _ = picture_of(self._group(file, group, column)[row].as_py())
        except (pyarrow.ArrowException, IndexError, KeyError) as error:
            raise ValueError(f"{where} of {self._location.text!r} cannot be read ({error}).") from error
        if content is None or hashlib.sha256(content).hexdigest()[:_DIGITS] != match[5][:_DIGITS]:
            raise ValueError(f"{where} of {self._location.text!r} holds another picture than when it was read.")
        return content

    def _group(self, file: str, group: int, column: str) -> pyarrow.ChunkedArray:
        key = (file, group, column)
        if key not in self._groups:
            location = self._location if self._location.name == file else self._location.child(file)
            self._groups[key] = _read_group(location, group, column)
            while len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _read_group(location: Location, group: int, column: str) -> pyarrow.ChunkedArray:
    if location.path.lower().endswith(".arrow"):
        return arrow_table(location).column(column).chunk(group)
    with location.open() as stream, parquet.ParquetFile(stream) as file:
        if group >= file.num_row_groups:
            raise IndexError(f"the file has {file.num_row_groups} row groups")
        return file.read_row_group(group, columns=[column], use_threads=False)[column]


def arrow_table(location: Location) -> pyarrow.Table:
    """The table of a local Arrow file, mapped into memory and not copied. Raises OSError or an ArrowException."""
    source = pyarrow.memory_map(location.path)
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()
