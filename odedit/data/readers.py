"""Streaming readers of JSON arrays, JSON Lines and Parquet.

Memory depends on the largest record, not on the number of records. Only the syntax is checked here; fields are checked
in `odedit.data.records`.
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
"""Deepest nesting of a record. Records need four levels; `json` cannot write much deeper ones."""
MAX_RECORD_BYTES = 16 * 2**20
BAD_LINE = "invalid JSON: line"
"""Start of the problem of a line that is not valid JSON; the line number follows."""
_BATCH_ROWS = 256
_BYTES_AT_ONCE = 2**16
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_CUT_OFF = 16
"""A parse error this close to the end of the buffer may mean that the value is incomplete: read on."""


@dataclass(frozen=True)
class Entry:
    """One record of a file: a JSON value, or the text that could not be parsed and the reason."""

    value: Any
    problem: str = ""


def read_entries(location: Location) -> Iterator[Entry]:
    """Yields the records of a `.json`, `.jsonl` or `.parquet` file in order.

    Raises:
        InputError: The file is missing, has another suffix, is unreadable, or is damaged after some records.
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
    """Raises InputError unless the location is a file."""
    try:
        exists = location.is_file()
    except OSError as error:
        raise InputError(f"{location.text}: cannot be accessed ({error}).") from error
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
    """Yields the elements of the outermost array."""
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
    """Incremental parser of a JSON file in any encoding that JSON allows. Accepts NaN and Infinity, as `json` does.

    Attributes:
        num_read: Number of records yielded so far.
    """

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder(_encoding(stream))().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._is_whole = "", 0, False
        self.num_read = 0

    def peek(self) -> str:
        """The next non-space character; empty at the end of the file."""
        while True:
            match = _WHITE_SPACE.match(self._text, self._at)
            assert match is not None, "white space may be empty"
            self._at = match.end()
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def expect(self, character: str) -> None:
        """Consumes `character`. Raises ValueError if another one follows."""
        if self.peek() != character:
            raise ValueError(f"expected {character!r}, got {self.peek() or 'the end'!r}")
        self._at += 1

    def value(self) -> Any:
        """Consumes and returns one JSON value.

        Raises:
            InputError: The value is larger than `MAX_RECORD_BYTES`.
            ValueError: The text is not valid JSON.
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
            # A number at the end of the buffer may continue in the next block.
            if end < len(self._text) or self._is_whole:
                self._at = end
                return value
            self._read_on()

    def _read_on(self) -> None:
        """Doubles the buffer, so that a long value is reparsed only a few times."""
        left = self._text[self._at :]
        data = self._stream.read(max(_BYTES_AT_ONCE, len(left)))
        self._is_whole = not data
        self._text, self._at = left + self._decode(data, self._is_whole), 0


def _encoding(stream: io.BufferedReader) -> str:
    """Encoding detected from the first bytes: UTF-8, UTF-16 or UTF-32, with or without byte order mark."""
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
    in_bytes = encoding.startswith("utf-8")  # decoded line by line: invalid UTF-8 makes one bad record only
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
        # str(error) would name line 1, since the decoder gets a single line.
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
    """Fields of a table row. Null means that the record lacks the field.

    `probes` and `held_out` may be structs, or JSON text if their keys differ between records.
    """
    fields = _without_nulls(row)
    for name in ("probes", "held_out"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = json.loads(fields[name])
            except ValueError:
                continue  # stays text; the validation of the fields reports it
    return fields


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _reason(error: BaseException) -> str:
    """Message of an error, without the position that a JSON error reports relative to the buffer."""
    return error.msg if isinstance(error, json.JSONDecodeError) else in_words(error)
