"""Files of records, read one record at a time: JSON arrays, JSON Lines and Parquet.

The memory in use depends on the largest record, not on their number. Only the syntax is looked at here;
what a record must hold is decided in `odedit.mmedit`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ijson
import pyarrow
from ijson.common import ObjectBuilder
from pyarrow import parquet

from odedit.addresses import relative_note
from odedit.errors import InputError
from odedit.locations import Location

MAX_DEPTH = 32
"""Deepest nesting accepted in a JSON array. Records need four levels; a file of opening brackets would fill memory."""
MAX_RECORD_BYTES = 16 * 2**20
BAD_LINE = "invalid JSON: line"
"""How the problem of a line that is no JSON begins; its number follows."""
_BATCH_ROWS = 256
_BYTES_AT_ONCE = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Entry:
    """One record as the file has it: any JSON value, or the text that could not be parsed and why."""

    value: Any
    problem: str = ""


def read_entries(location: Location) -> Iterator[Entry]:
    """Every record of a `.json`, `.jsonl` or `.parquet` file, in the file's order.

    Raises:
        InputError: The file is missing, of another kind, unreadable, or broken from some record on.
    """
    readers = {".json": _read_array, ".jsonl": _read_lines, ".parquet": _read_parquet}
    suffix = next((ending for ending in readers if location.path.lower().endswith(ending)), None)
    if suffix is None:
        raise InputError(
            f"{location.text}: not a file of records by its name. Allowed: .json (an array of objects), "
            ".jsonl (one object per line), .parquet, or a folder written by `odedit data pack`."
        )
    check_is_file(location)
    try:
        stream = location.open()
    except OSError as error:
        raise InputError(f"{location.text}: cannot be opened ({error}).") from error
    with stream:
        yield from readers[suffix](stream, location.text)


def check_is_file(location: Location) -> None:
    """Raises InputError unless there is a file."""
    try:
        exists = location.is_file()
    except OSError as error:
        raise InputError(f"{location.text}: cannot be looked at ({error}).") from error
    if not exists:
        raise InputError(f"{location.text}: there is no such file.{relative_note(location.path)}")


def _read_array(stream: Any, text: str) -> Iterator[Entry]:
    if stream.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
        stream.seek(0)
    metered = _Metered(io.BufferedReader(stream, _BYTES_AT_ONCE), text)
    try:
        for value in _array_items(ijson.basic_parse(metered), text):
            yield Entry(value)
            metered.end_record()
    except InputError:
        raise
    # SystemError: for a whole number of thousands of digits, ijson fails without saying so, and the next call does.
    except (ijson.JSONError, ValueError, OSError, SystemError) as error:
        where = f"after record {metered.num_read - 1}" if metered.num_read else "before the first record"
        raise InputError(
            f"{text}: not valid JSON {where} ({_first_line(_said_by(error))}). The file is damaged or was cut off; "
            "fetch it again and compare its size."
        ) from error


class _Metered:
    """A stream that refuses to give a record of more than `MAX_RECORD_BYTES`.

    The parser reads ahead, so some kB of a record may count for the one before it.
    """

    def __init__(self, stream: Any, text: str) -> None:
        self._stream, self._text = stream, text
        self.num_read, self._num_bytes = 0, 0

    def end_record(self) -> None:
        self.num_read, self._num_bytes = self.num_read + 1, 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._num_bytes += len(data)
        if self._num_bytes > MAX_RECORD_BYTES:
            limit = f"{MAX_RECORD_BYTES // 2**20} MiB"
            raise InputError(f"{self._text}: record {self.num_read} is larger than {limit}; no record needs so much.")
        return data


def _array_items(events: Iterator[tuple[str, Any]], text: str) -> Iterator[Any]:
    """The elements of the outermost array.

    `ijson.items` would do, but it keeps the path of every open bracket, and so a file of brackets fills memory.
    """
    if next(events)[0] != "start_array":
        raise InputError(
            f"{text}: expected a JSON array of objects, '[{{...}}, ...]'. "
            "A file with one object per line must be named .jsonl."
        )
    depth, builder = 0, ObjectBuilder()
    for event, value in events:
        if depth == 0 and event == "end_array":
            continue
        if event in ("start_map", "start_array"):
            depth += 1
        elif event in ("end_map", "end_array"):
            depth -= 1
        if depth > MAX_DEPTH:
            raise InputError(f"{text}: nested deeper than {MAX_DEPTH} levels; this is not a file of records.")
        builder.event(event, value)
        if depth == 0:
            yield builder.value
            builder = ObjectBuilder()


def _read_lines(stream: Any, text: str) -> Iterator[Entry]:
    lines = io.BufferedReader(stream, _BYTES_AT_ONCE)
    number = 0
    while True:
        try:
            line = lines.readline(MAX_RECORD_BYTES)
        except OSError as error:
            raise InputError(f"{text}: reading failed after line {number} ({error}).") from error
        if not line:
            return
        number += 1
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            raise InputError(
                f"{text}: line {number} is longer than {MAX_RECORD_BYTES // 2**20} MiB. "
                "A file that holds one JSON array must be named .json."
            )
        line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            yield _parse_line(line, number)


def _parse_line(line: bytes, number: int) -> Entry:
    try:
        return Entry(json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        unparsed = line.decode("utf-8", errors="replace").rstrip("\n")
        # A JSON error would call this line 1 of what it was given.
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else _first_line(error)
        return Entry(unparsed, f"{BAD_LINE} {number} cannot be parsed ({reason})")


def _read_parquet(stream: Any, text: str) -> Iterator[Entry]:
    num_read = 0
    try:
        with parquet.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield Entry(_from_columns(row))
                    num_read += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{text}: not a readable Parquet file after {num_read} records ({_first_line(error)}). "
            "Fetch or write it again."
        ) from error


def _from_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A table gives every record every column: nulls mean that the record has no such field.

    `probes` and `held_out` may be structs, or JSON text where their keys differ from record to record.
    """
    fields = _without_nulls(row)
    for name in ("probes", "held_out"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = json.loads(fields[name])
            except ValueError:
                continue  # stays text, which the check of the fields then reports
    return fields


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _said_by(error: BaseException) -> BaseException:
    return error.__cause__ if isinstance(error, SystemError) and error.__cause__ else error


def _first_line(error: BaseException) -> str:
    message = error.args[0] if error.args else ""
    if isinstance(message, bytes):  # ijson passes on the raw text when it is not UTF-8
        message = message.decode("utf-8", errors="replace")
    lines = str(message or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
