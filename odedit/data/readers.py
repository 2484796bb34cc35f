"""Files of records, read one record at a time: JSON arrays, JSON Lines and Parquet.

The memory in use depends on the largest record, not on their number. Only the syntax is looked at here;
what a record must hold is decided in `odedit.data.records`.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.errors import InputError, in_words
from odedit.runtime.addresses import relative_note
from odedit.storage.location import Location

MAX_DEPTH = 32
"""Deepest nesting accepted in a record. Records need four levels; what is much deeper cannot be written again."""
MAX_RECORD_BYTES = 16 * 2**20
BAD_LINE = "invalid JSON: line"
"""How the problem of a line that is no JSON begins; its number follows."""
_BATCH_ROWS = 256
_BYTES_AT_ONCE = 2**16
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_CUT_OFF = 16
"""An error in this many last characters of the buffer may only mean that the value is not complete yet."""


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
    source = _Text(io.BufferedReader(stream, _BYTES_AT_ONCE), text)
    try:
        for value in _array_items(source, text):
            if _is_too_deep(value):
                raise InputError(f"{text}: nested deeper than {MAX_DEPTH} levels; this is not a file of records.")
            yield Entry(value)
            source.num_read += 1
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{text}: nested deeper than {MAX_DEPTH} levels; this is not a file of records.") from error
    except (ValueError, OSError) as error:
        where = f"after record {source.num_read - 1}" if source.num_read else "before the first record"
        raise InputError(
            f"{text}: not valid JSON {where} ({_reason(error)}). The file is damaged or was cut off; "
            "fetch it again and compare its size."
        ) from error


def _array_items(source: _Text, text: str) -> Iterator[Any]:
    """The elements of the outermost array, one at a time."""
    if source.peek() == "{" or (source.peek() != "[" and source.value() is not None):
        raise InputError(
            f"{text}: expected a JSON array of objects, '[{{...}}, ...]'. "
            "A file with one object per line must be named .jsonl."
        )
    source.expect("[")
    if source.peek() != "]":
        yield source.value()
        while source.peek() != "]":
            source.expect(",")
            yield source.value()
    source.expect("]")
    if source.peek():
        raise ValueError("more text behind the array")


class _Text:
    """The text of a JSON file, in any encoding that JSON may have, read as it is needed.

    NaN and Infinity are read as Python writes them, as in a line of a .jsonl file.

    Attributes:
        num_read: Records given so far.
    """

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder(_encoding(stream))().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._is_whole = "", 0, False
        self.num_read = 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _WHITE_SPACE.match(self._text, self._at)
            assert match is not None, "white space may be empty"
            self._at = match.end()
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def expect(self, character: str) -> None:
        """Takes a character. Raises ValueError if there is another."""
        if self.peek() != character:
            raise ValueError(f"expected {character!r}, got {self.peek() or 'the end'!r}")
        self._at += 1

    def value(self) -> Any:
        """Takes a value.

        Raises:
            InputError: It is too large.
            ValueError: It is no JSON.
        """
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _CUT_OFF
                if self._is_whole or not goes_on:
                    raise
                end = len(self._text)
            if end - self._at > MAX_RECORD_BYTES:
                limit = f"{MAX_RECORD_BYTES // 2**20} MiB"
                raise InputError(
                    f"{self._name}: record {self.num_read} is larger than {limit}; no record needs so much."
                )
            # A number goes on where more digits follow.
            if end < len(self._text) or self._is_whole:
                self._at = end
                return value
            self._read_on()

    def _read_on(self) -> None:
        """Reads as much as is there already, so that a long value is parsed a few times only."""
        left = self._text[self._at :]
        data = self._stream.read(max(_BYTES_AT_ONCE, len(left)))
        self._is_whole = not data
        self._text, self._at = left + self._decode(data, self._is_whole), 0


def _encoding(stream: io.BufferedReader) -> str:
    """The encoding, by the first bytes: UTF-8, UTF-16 or UTF-32, with or without a byte order mark."""
    return json.detect_encoding(stream.peek(4)[:4])


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _read_lines(stream: Any, text: str) -> Iterator[Entry]:
    lines = io.BufferedReader(stream, _BYTES_AT_ONCE)
    encoding, number = _encoding(lines), 0
    in_bytes = encoding.startswith("utf-8")  # a line that is no UTF-8 costs that line only
    decoded = None if in_bytes else io.TextIOWrapper(lines, encoding, newline="\n")
    while True:
        try:
            if decoded is None:
                line = lines.readline(MAX_RECORD_BYTES)
            else:
                line = decoded.readline(MAX_RECORD_BYTES).encode("utf-8", "surrogatepass")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text}: reading failed after line {number} ({error}).") from error
        if not line:
            return
        number += 1
        if len(line) >= MAX_RECORD_BYTES and not line.endswith(b"\n"):
            raise InputError(
                f"{text}: line {number} is longer than {MAX_RECORD_BYTES // 2**20} MiB. "
                "A file that holds one JSON array must be named .json."
            )
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield _parse_line(line, number)


def _parse_line(line: bytes, number: int) -> Entry:
    try:
        value = json.loads(line.decode("utf-8"))
        if _is_too_deep(value):
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        return Entry(value)
    except (ValueError, RecursionError) as error:
        unparsed = line.decode("utf-8", errors="replace").rstrip("\n")
        # A JSON error would call this line 1 of what it was given.
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else in_words(error)
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
            f"{text}: not a readable Parquet file after {num_read} records ({in_words(error)}). "
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


def _reason(error: BaseException) -> str:
    """What an error says of a part of a file; a JSON error would also say where in that part."""
    return error.msg if isinstance(error, json.JSONDecodeError) else in_words(error)
