"""Records in the format of MMEdit.

The four files of MMEdit (`vqa_train.json`, `vqa_eval.json`, `caption_train_edit.json`, `caption_eval_edit.json`)
load unchanged. Records may add `edit_id`, `task`, `probes` (further evaluation probes by metric name) and `held_out`
(supervision by slot name, disjoint from what is scored).

A bad record does not stop a run: its `problem` is set, and it is reported. A file that cannot be read does.

References:
    Can We Edit Multimodal Large Language Models? Cheng et al., EMNLP 2023 (MMEdit).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from odedit.data.fields import TASKS, marker_problem, problem_of_fields, shorten, task_of, type_name, without_markers
from odedit.data.packed import is_pack, read_packed_rows
from odedit.data.readers import BAD_LINE, Entry, read_entries
from odedit.errors import InputError
from odedit.inputs.batch import EditRequest, Probe
from odedit.storage.location import Location, locate


@dataclass(frozen=True)
class RawRecord:
    """One record as read; usable if `problem` is empty.

    Attributes:
        file: Name of the source file, without its folder.
        index: Position in that file, from 0.
        edit_id: The record's `edit_id`, or `<file stem>-<index>`; unique within a file.
        task: `vqa` or `caption`.
        fields: Keys and values, leading image markers removed. `{"unparsed": ...}` if the record is no JSON object.
        problem: `<kind>: <what and where>`, or empty.
    """

    file: str
    index: int
    edit_id: str
    task: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def where(self) -> str:
        """Name in messages: file and number; the file alone if the problem names the line."""
        return self.file if self.problem.startswith(BAD_LINE) else f"{self.file}, record {self.index}"

    def to_row(self) -> dict[str, Any]:
        """Columns of plain types, `fields` as JSON text."""
        return {
            "file": self.file,
            "index": self.index,
            "edit_id": self.edit_id,
            "task": self.task,
            "fields": json.dumps(dict(self.fields), default=_plain),
            "problem": self.problem,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> RawRecord:
        """The inverse of `to_row`; extra columns are ignored."""
        values = {name: row[name] for name in ("file", "index", "edit_id", "task", "problem")}
        return cls(**values | {"index": int(row["index"])}, fields=json.loads(row["fields"]))


Check = Callable[[Mapping[str, Any]], str]
"""Check of valid fields against a model: returns the problem as `<kind>: <what>`, or an empty text."""


def read_records(
    path: str, *, task: str = "auto", limit: int | None = None, check: Check | None = None
) -> Iterator[RawRecord]:
    """Streams the records of a file or of a packed folder, bad ones included.

    Memory grows with the file only by the detection of repeated edit ids: about 200 bytes per record with an
    `edit_id`, one byte per record without.

    Args:
        path: `.json`, `.jsonl`, `.parquet`, or a folder written by `odedit.data.pack.pack`; local or an address.
        task: `vqa` or `caption` for records without a task; `auto`: caption if the prompt is "a photo of".
        limit: Number of *usable* records after which to stop; bad ones in between are yielded, too.
        check: Additional check of valid records.

    Raises:
        InputError: The file is missing or damaged; records yielded before that remain valid.
    """
    if task not in (*TASKS, "auto"):
        raise InputError(f"data.task: got {task!r}, expected one of auto, {', '.join(TASKS)}.")
    if limit is not None and limit < 0:
        raise InputError(f"data.limit: got {limit}, expected 0 or more records.")
    location = locate(path, "data.path")
    records = _read_pack(location) if is_pack(location) else _read_file(location, task)
    num_usable = 0
    if limit == 0:
        return
    for record in records:
        if check is not None and not record.problem:
            record = replace(record, problem=check(record.fields))
        yield record
        num_usable += not record.problem
        if num_usable == limit:
            return


def _read_pack(location: Location) -> Iterator[RawRecord]:
    for row in read_packed_rows(location):
        record = RawRecord.from_row(row)
        if not record.problem:
            fields = without_markers(record.fields)
            record = replace(record, fields=fields, problem=marker_problem(fields))
        yield record


def _read_file(location: Location, task: str) -> Iterator[RawRecord]:
    name = location.name.encode("utf-8", errors="replace").decode()
    edit_ids = _EditIds(name)
    for index, entry in enumerate(read_entries(location)):
        yield _to_record(name, index, entry, edit_ids, task)


def _to_record(file: str, index: int, entry: Entry, edit_ids: _EditIds, default_task: str) -> RawRecord:
    if entry.problem or not isinstance(entry.value, dict):
        problem = entry.problem or f"wrong type: the record is {type_name(entry.value)}, expected an object with fields"
        text = entry.value if isinstance(entry.value, str) else json.dumps(entry.value, default=_plain)
        fallback = "vqa" if default_task == "auto" else default_task
        return RawRecord(file, index, edit_ids.fallback(index), fallback, {"unparsed": text}, problem)
    fields = without_markers(entry.value)
    record_task = task_of(fields, default_task)
    edit_id, id_problem = edit_ids.assign(index, fields.get("edit_id"))
    problem = problem_of_fields(fields, record_task) or id_problem
    return RawRecord(file, index, edit_id, record_task, fields, problem)


class _EditIds:
    """Assigns every record of a file a unique edit id that is a valid file name."""

    def __init__(self, file: str) -> None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.rsplit(".", 1)[0]).lstrip("._-")
        self._stem = stem[:100] or "record"
        self._seen: set[bytes] = set()
        self._has_default = bytearray()  # one byte per record: cheaper than digests for files without edit ids

    def assign(self, index: int, wanted: Any) -> tuple[str, str]:
        """The record's edit id, and the problem with the requested one."""
        if wanted is None:
            return self.fallback(index), ""
        if not isinstance(wanted, str):
            return self.fallback(index), f"wrong type: field 'edit_id' is {type_name(wanted)}, expected text"
        try:
            EditRequest(wanted, Probe("", ""))  # owns the rule for edit ids
        except ValueError as error:
            return self.fallback(index), f"invalid edit_id: {shorten(str(error), 300)}"
        if not self._claim(wanted):
            return self.fallback(index), f"repeated edit_id: {wanted!r} was given to an earlier record"
        return wanted, ""

    def fallback(self, index: int) -> str:
        name = f"{self._stem}-{index:06d}"
        self._has_default.extend(bytes(index - len(self._has_default)) + b"\x01")
        if self._digest(name) not in self._seen:
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
        digest = self._digest(name)
        is_new = digest not in self._seen
        self._seen.add(digest)
        return is_new

    @staticmethod
    def _digest(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else repr(value)  # types of Parquet columns
