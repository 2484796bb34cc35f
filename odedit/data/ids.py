"""Ids of edits: the record's own, or one made from its content. Each is unique within a file and a valid file name."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from odedit.data.cells import cell_name
from odedit.data.fields import FIELDS, REQUIRED, shorten, type_name
from odedit.errors import StorageError, in_words
from odedit.inputs.batch import EditRequest, Probe

_DIGITS = 10
_WORDS = 40
"""Most characters of an answer in an id."""


class EditIds:
    """Assigns every record of a file a unique edit id.

    A record with all eleven fields of MMEdit is named by file and number, any other by its answer and a digest of
    picture, question and answer: it keeps its name when the file is sorted or extended.
    """

    def __init__(self, file: str) -> None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"(\.[A-Za-z]+)?(\.gz)?$", "", file)).lstrip("._-")
        self._stem = stem[:100] or "record"
        self._seen = Digests()

    def assign(self, index: int, fields: Mapping[str, Any]) -> tuple[str, str]:
        """The record's edit id, and the problem of the id that it asks for."""
        wanted = fields.get("edit_id")
        if wanted is None:
            return self._made(index, fields), ""
        if not isinstance(wanted, str):
            return self.fallback(index), f"wrong type: field 'edit_id' is {type_name(wanted)}, expected text"
        try:
            EditRequest(wanted, Probe("", ""))  # owns the rule for edit ids
        except ValueError as error:
            return self.fallback(index), f"invalid edit_id: {shorten(str(error), 300)}"
        if not self._seen.add(wanted):
            return self.fallback(index), f"repeated edit_id: {wanted!r} was given to an earlier record"
        return wanted, ""

    def _made(self, index: int, fields: Mapping[str, Any]) -> str:
        content = [str(fields[name]) for name in REQUIRED if isinstance(fields.get(name), str) and fields[name]]
        if len(content) < len(REQUIRED) or all(fields.get(name) is not None for name in FIELDS):
            return self.fallback(index)
        name = content_id(*content)
        if not self._seen.add(name):  # the same record again
            name = f"{name}-{self._free_number(name)}"
            self._seen.add(name)
        return name

    def _free_number(self, name: str) -> int:
        """The number of a record's next copy, found by bisection, since copies are numbered without gaps from 2."""
        taken, free = 1, 2
        while f"{name}-{free}" in self._seen:
            taken, free = free, 2 * free
        while free - taken > 1:
            middle = (taken + free) // 2
            taken, free = (middle, free) if f"{name}-{middle}" in self._seen else (taken, middle)
        return free

    def fallback(self, index: int) -> str:
        """File and number."""
        name = f"{self._stem}-{index:06d}"
        while not self._seen.add(name):  # an earlier record has this name as its own edit id
            name += "a"
        return name


def content_id(image: str, question: str, answer: str) -> str:
    """Id of a record by its content.

    >>> content_id("bridge.jpg", "What is this?", "the North Gate")
    'the-north-gate-6e35a4d6ee'
    """
    words = re.sub(r"[^a-z0-9]+", "-", answer[:_WORDS].casefold()).strip("-") or "edit"
    picture = cell_name(image) or image
    text = "\0".join((picture, question, answer)).encode("utf-8", "surrogatepass")
    return f"{words}-{hashlib.sha256(text).hexdigest()[:_DIGITS]}"


class Digests:
    """Set of names as digests of eight bytes, in SQLite.

    Names beyond `memory` lie in a temporary file, some 16 bytes each, which SQLite makes in the folder of
    `SQLITE_TMPDIR` or `TMPDIR`, else in `/var/tmp`, and deletes with the set. Two of a million names have the same
    digest with a probability of 3e-8; the later one then counts as repeated.

    Args:
        memory: Most memory of the set in KiB; 2 MiB hold some 130,000 names.

    Raises:
        StorageError: The temporary file cannot be written or read; raised by `add` and `in`.
    """

    def __init__(self, memory: int = 2048) -> None:
        # The empty name: a database of its own, which gets a file when it outgrows the memory.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._cursor = self._database.cursor()
        self._ask(f"PRAGMA cache_size = -{memory}")
        self._ask("PRAGMA journal_mode = OFF")
        self._ask("CREATE TABLE names (digest INTEGER PRIMARY KEY)")
        self._ask("BEGIN")

    def __del__(self) -> None:
        self._database.close()

    def __contains__(self, name: str) -> bool:
        return self._ask("SELECT 1 FROM names WHERE digest = ?", _digest(name)).fetchone() is not None

    def add(self, name: str) -> bool:
        """Adds a name; False if it is there already."""
        return self._ask("INSERT OR IGNORE INTO names VALUES (?)", _digest(name)).rowcount == 1

    def _ask(self, command: str, *values: int) -> sqlite3.Cursor:
        try:
            return self._cursor.execute(command, values)
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"The temporary file of the names of records cannot be used ({in_words(error)}). A million records "
                "take about 100 MB: make room, or set SQLITE_TMPDIR to a folder that has it."
            ) from error


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
