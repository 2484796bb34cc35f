"""Readers of tables: CSV and TSV, Parquet, folders of Parquet files, and data sets that `datasets` saved on disk."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import parquet

from odedit.data.cells import arrow_table, with_references
from odedit.errors import InputError, in_words
from odedit.storage.location import Location

MAX_RECORD_BYTES = 16 * 2**20
_ROWS_AT_ONCE = 64
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Entry:
    """One record of a file: a JSON value, or the text that could not be parsed and the reason."""

    value: Any
    problem: str = ""


def shards(folder: Location) -> list[Location]:
    """Files of records in a folder: Parquet files, or the Arrow files of a data set on disk; empty if it has none.

    Raises:
        InputError: The folder holds several splits of a data set.
    """
    names = folder.names()
    if "dataset_dict.json" in names:
        splits = [child.name for child in folder.glob() if child.is_folder()]
        raise InputError(
            f"{folder.text}: holds several splits of a data set; name one of them: {', '.join(splits) or 'none there'}."
        )
    for ending in (".parquet", ".arrow"):
        found = [name for name in names if name.lower().endswith(ending)]
        if found:
            return [folder.child(name) for name in found]
    return []


def read_delimited(stream: Any, text: str, delimiter: str | None) -> Iterator[Entry]:
    """Records of a CSV file; an empty cell means that the record lacks the field.

    A first line such as `sep=;`, which spreadsheets write, names the character between cells.

    Args:
        stream: Binary stream.
        text: Name of the file in messages.
        delimiter: Character between cells; None: the one of `,;` tab and `|` that the header has most of.
    """
    source = io.BufferedReader(stream, 2**16)
    encoding = json.detect_encoding(source.peek(4)[:4])
    # Bytes that are no UTF-8 cost the record that holds them.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    lines = _Lines(io.TextIOWrapper(source, encoding, errors=errors, newline=""), text)
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        first = next(lines, "")
        if named := re.fullmatch(rf"sep=([{_DELIMITERS}])\s*", first):
            delimiter, first = named[1], next(lines, "")
        chosen = delimiter or max(_DELIMITERS, key=lambda character: (first.count(character), character == ","))
        rows = csv.reader(lines, delimiter=chosen)
        header = [name.strip() for name in next(csv.reader([first], delimiter=chosen), [])]
        _check_header(header, text)
        for row in rows:
            if any(cell.strip() for cell in row):
                yield _from_row(row, header, lines.number, chosen)
    except (csv.Error, OSError, UnicodeError) as error:
        raise InputError(
            f"{text}: line {lines.number} cannot be read as a table ({in_words(error)}). A quote that is opened and "
            "not closed is the commonest reason."
        ) from error


class _Lines(Iterator[str]):
    """Lines of a text, none of them longer than a record may be.

    Attributes:
        number: Number of the last line read.
    """

    def __init__(self, stream: io.TextIOWrapper, text: str) -> None:
        self._stream, self._text, self.number = stream, text, 0

    def __next__(self) -> str:
        line = self._stream.readline(MAX_RECORD_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) >= MAX_RECORD_BYTES and not line.endswith("\n"):
            raise InputError(f"{self._text}: line {self.number} is longer than {MAX_RECORD_BYTES // 2**20} MiB.")
        return line


def _check_header(header: Sequence[str], text: str) -> None:
    if not any(header):
        raise InputError(
            f"{text}: is empty, expected a first line with the names of the columns, such as image,question,answer."
        )
    twice = sorted({name for name in header if header.count(name) > 1 and name})
    if twice:
        raise InputError(f"{text}: the first line names the column {twice[0]!r} twice.")


def _from_row(row: Sequence[str], header: Sequence[str], line: int, delimiter: str) -> Entry:
    if any(cell.strip() for cell in row[len(header) :]):
        return Entry(
            "\t".join(row),
            f"wrong number of cells: line {line} has {len(row)}, and the first line names {len(header)}; a cell with "
            f"{delimiter!r} in it needs quotes",
        )
    return Entry(from_columns({name: cell for name, cell in zip(header, row, strict=False) if name and cell != ""}))


def read_parquet(stream: Any, text: str, name: str) -> Iterator[Entry]:
    """Records of a Parquet file; null means that the record lacks the field.

    Args:
        name: Name of the file, for references to pictures.
    """
    num_read = 0
    try:
        with parquet.ParquetFile(stream) as file:
            for group in range(file.num_row_groups):
                row = 0
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group]):
                    for values in batch.to_pylist():
                        yield Entry(from_columns(_referenced(values, name, group, row)))
                        row, num_read = row + 1, num_read + 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{text}: not a readable Parquet file after {num_read} records ({in_words(error)}). "
            "Fetch or write it again."
        ) from error


def read_arrow(location: Location) -> Iterator[Entry]:
    """Records of an Arrow file of a data set on disk."""
    if not location.is_local:
        raise InputError(f"{location.text}: Arrow files are read from a local disk; copy it, or save it as Parquet.")
    num_read = 0
    try:
        for group, batch in enumerate(arrow_table(location).to_batches()):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row, values in enumerate(batch.slice(start, _ROWS_AT_ONCE).to_pylist(), start):
                    yield Entry(from_columns(_referenced(values, location.name, group, row)))
                    num_read += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{location.text}: not a readable Arrow file after {num_read} records ({in_words(error)}). Save it again."
        ) from error


def _referenced(values: dict[str, Any], file: str, group: int, row: int) -> dict[str, Any]:
    return {column: with_references(value, file, group, row, column) for column, value in values.items()}


def from_columns(row: dict[str, Any]) -> dict[str, Any]:
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
