"""Streaming readers of files of records: JSON arrays and JSON Lines here, tables in `odedit.data.tables`.

Memory depends on the largest record, not on the number of records. Only the syntax is checked here; fields are checked
in `odedit.data.records`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from odedit.data.tables import MAX_RECORD_BYTES, Entry, read_arrow, read_delimited, read_parquet, shards
from odedit.errors import InputError, in_words
from odedit.runtime.addresses import relative_note
from odedit.storage.location import Location

MAX_DEPTH = 32
"""Deepest nesting of a record. Records need four levels; `json` cannot write much deeper ones."""
BAD_LINE = "invalid JSON: line"
"""Start of the problem of a line that is not valid JSON; the line number follows."""
_BYTES_AT_ONCE = 2**16
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_CUT_OFF = 16
"""A parse error this close to the end of the buffer may mean that the value is incomplete: read on."""


ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files of records. All but the last two may be followed by `.gz`."""


def read_entries(location: Location) -> Iterator[Entry]:
    """Yields the records of a file, or of all files of a folder of Parquet files or of a data set on disk, in order.

    Raises:
        InputError: The file is missing, has another suffix, is unreadable, or is damaged after some records.
    """
    if location.is_folder():
        for file in shards(location):
            yield from read_entries(file)
        return
    name = location.path.lower()
    is_zipped = name.endswith(".gz")
    ending = next((end for end in ENDINGS if name.removesuffix(".gz").endswith(end)), None)
    if ending is None or (is_zipped and ending in ENDINGS[-2:]):
        raise InputError(
            f"{location.text}: not a file of records by its name. Allowed: .json (an array of objects), "
            ".jsonl (one object per line), .csv, .tsv, each also with .gz; .parquet, a folder of Parquet files, a data "
            "set saved on disk, or a folder written by `odedit data pack`. Save a spreadsheet as CSV, in UTF-8."
        )
    check_is_file(location)
    if ending == ".arrow":
        yield from read_arrow(location)
        return
    try:
        stream: Any = location.open()
    except OSError as error:
        raise InputError(f"{location.text}: cannot be opened ({error}).") from error
    with stream:
        text = location.text
        opened = _Unzipped(stream) if is_zipped else stream
        try:
            if ending == ".json":
                yield from _read_array(opened, text)
            elif ending in (".csv", ".tsv"):
                yield from read_delimited(opened, text, "\t" if ending == ".tsv" else None)
            elif ending == ".parquet":
                yield from read_parquet(opened, text, location.name)
            else:
                yield from _read_lines(opened, text)
        except OSError as error:
            raise InputError(f"{text}: cannot be read ({error}). Fetch it again.") from error


class _Unzipped(io.RawIOBase):
    """Content of a gzip file. A damaged one raises OSError, as other files do."""

    def __init__(self, stream: Any) -> None:
        self._stream = gzip.GzipFile(fileobj=stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error) as error:
            raise OSError(f"the gzip file is cut off or damaged: {error}") from error
        buffer[: len(data)] = data
        return len(data)


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
        raise ValueError("more text after the array")


class _Text:
    """Incremental parser of a JSON file in any encoding that JSON allows. Accepts NaN and Infinity, as `json` does.

    Attributes:
        num_read: Number of records yielded so far.
    """

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._stream, self._name = stream, name
        encoding = _encoding(stream)
        # Bytes that are no UTF-8 cost the record that holds them: the check of its fields finds them.
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        self._decode = codecs.getincrementaldecoder(encoding)(errors).decode
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


def _reason(error: BaseException) -> str:
    """Message of an error, without the position that a JSON error reports relative to the buffer."""
    return error.msg if isinstance(error, json.JSONDecodeError) else in_words(error)
