"""Ids of edits: the record's own, or one made from its content. Each is unique within a file and a valid file name."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Mapping
from typing import Any

from odedit.data.cells import cell_name
from odedit.data.fields import FIELDS, REQUIRED, shorten, type_name
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
        self._has_default = bytearray()  # one byte per record: cheaper than digests for files without edit ids

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
        if not self._claim(wanted):
            return self.fallback(index), f"repeated edit_id: {wanted!r} was given to an earlier record"
        return wanted, ""

    def _made(self, index: int, fields: Mapping[str, Any]) -> str:
        content = [str(fields[name]) for name in REQUIRED if isinstance(fields.get(name), str) and fields[name]]
        if len(content) < len(REQUIRED) or all(fields.get(name) is not None for name in FIELDS):
            return self.fallback(index)
        name = base = content_id(*content)
        number = 1
        while not self._claim(name):  # the same record again
            number += 1
            name = f"{base}-{number}"
        return name

    def fallback(self, index: int) -> str:
        """File and number."""
        name = f"{self._stem}-{index:06d}"
        self._has_default.extend(bytes(index - len(self._has_default)) + b"\x01")
        if name not in self._seen:
            return name
        self._has_default[index] = 0
        while not self._claim(name):  # an earlier record has this name as its own edit id
            name += "a"
        return name

    def _claim(self, name: str) -> bool:
        stem, _, number = name.rpartition("-")
        if stem == self._stem and re.fullmatch(r"[0-9]{6,9}", number):
            index = int(number)
            if name == f"{stem}-{index:06d}" and index < len(self._has_default) and self._has_default[index]:
                return False
        return self._seen.add(name)


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
    """Set of names as digests of eight bytes in one table, about 20 bytes for a name.

    Two of a million names have the same digest with a probability of 3e-8; the later one then counts as repeated.
    """

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 * 1024))
        self._count = 0

    def __contains__(self, name: str) -> bool:
        digest = self._digest(name)
        return self._table[self._slot(digest)] == digest

    def add(self, name: str) -> bool:
        """Adds a name; False if it is there already."""
        digest = self._digest(name)
        slot = self._slot(digest)
        if self._table[slot] == digest:
            return False
        self._table[slot] = digest
        self._count += 1
        if 2 * self._count > len(self._table):
            self._grow()
        return True

    def _slot(self, digest: int) -> int:
        """Slot that holds the digest, or the free one where it belongs."""
        table, mask = self._table, len(self._table) - 1
        slot = digest & mask
        while table[slot] not in (0, digest):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        before, self._table = self._table, array("Q", bytes(16 * len(self._table)))
        for digest in before:
            if digest:
                self._table[self._slot(digest)] = digest

    @staticmethod
    def _digest(name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) or 1
