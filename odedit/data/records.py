"""Records: a picture, a question and its right answer, and whatever else scores or supervises the edit.

The files of MMEdit and of other benchmarks load unchanged (`odedit.data.layouts`). Records may add `edit_id`, `task`,
`probes` (further evaluation probes by metric name) and `held_out` (supervision by slot name, disjoint from what is
scored).

A bad record does not stop a run: its `problem` is set and reported. An unreadable file stops the run.

References:
    Can We Edit Multimodal Large Language Models? Cheng et al., EMNLP 2023 (MMEdit).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from odedit.data.fields import (
    IMAGES,
    TASKS,
    marker_problem,
    problem_of_fields,
    task_of,
    type_name,
    without_markers,
)
from odedit.data.ids import EditIds
from odedit.data.layouts import CONSISTENCY, INDICES, LayoutError, layout_of
from odedit.data.names import renamed
from odedit.data.packed import is_pack, read_packed_rows
from odedit.data.readers import BAD_LINE, Entry, read_entries
from odedit.errors import InputError
from odedit.storage.location import Location, locate


@dataclass(frozen=True)
class RawRecord:
    """One record as read; usable if `problem` is empty.

    Attributes:
        file: Name of the source file, without its folder.
        index: Position in that file, from 0.
        edit_id: The record's `edit_id`, or one that is made, see `odedit.data.ids`; unique within a file.
        task: `vqa` or `caption`.
        fields: Values under MMEdit's names, leading image markers removed. `{"unparsed": ...}` if the record is no JSON
            object.
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
    path: str,
    *,
    task: str = "auto",
    limit: int | None = None,
    check: Check | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[RawRecord]:
    """Streams the records of a file or of a folder, bad ones included.

    Memory does not grow with the file; the ids of many records lie in a temporary file, see `odedit.data.ids.Digests`.

    Args:
        path: File (see `odedit.data.readers.ENDINGS`), folder of Parquet files, data set saved on disk, or folder
            written by `odedit.data.pack.pack`; local or an address.
        task: `vqa` or `caption` for records without a task; `auto`: caption if the prompt is "a photo of".
        limit: Largest number of *usable* records; bad records before the last of them are yielded, too.
        check: Additional check of valid records.
        columns: Columns of the file by field, see `odedit.data.names.renamed`.

    Raises:
        InputError: The file is missing or damaged; records yielded before that remain valid.
    """
    if task not in (*TASKS, "auto"):
        raise InputError(f"data.task: got {task!r}, expected one of auto, {', '.join(TASKS)}.")
    if limit is not None and limit < 0:
        raise InputError(f"data.limit: got {limit}, expected 0 or more records.")
    location = locate(path, "data.path")
    records = _read_pack(location) if is_pack(location) else _read_file(location, task, columns)
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


def _read_file(location: Location, task: str, columns: Mapping[str, str]) -> Iterator[RawRecord]:
    name = location.name.encode("utf-8", errors="replace").decode()
    edit_ids = EditIds(name)
    consistency: _Consistency | None = None
    for index, entry in enumerate(read_entries(location)):
        if isinstance(entry.value, dict) and any(key in entry.value for key in INDICES):
            consistency = consistency or _Consistency(location)
            entry = Entry(consistency.added_to(entry.value), entry.problem)
        yield _to_record(name, index, entry, edit_ids, task, columns)


def _to_record(
    file: str, index: int, entry: Entry, edit_ids: EditIds, default_task: str, columns: Mapping[str, str]
) -> RawRecord:
    if entry.problem or not isinstance(entry.value, dict):
        problem = entry.problem or f"wrong type: the record is {type_name(entry.value)}, expected an object with fields"
        text = entry.value if isinstance(entry.value, str) else json.dumps(entry.value, default=_plain)
        fallback = "vqa" if default_task == "auto" else default_task
        return RawRecord(file, index, edit_ids.fallback(index), fallback, {"unparsed": text}, problem)
    problem = ""
    try:
        value = layout_of(entry.value).read(entry.value)
    except LayoutError as error:
        value, problem = entry.value, str(error)
    fields = without_markers(_with_plain_pictures(renamed(value, columns)))
    record_task = task_of(fields, default_task)
    edit_id, id_problem = edit_ids.assign(index, fields)
    problem = problem or problem_of_fields(fields, record_task) or id_problem
    return RawRecord(file, index, edit_id, record_task, fields, problem)


def _with_plain_pictures(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the path of each picture that is given as a list with one, or as a struct with a path."""
    for name in IMAGES:
        value = fields.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]
        if isinstance(value, str):
            fields[name] = value
    return fields


class _Consistency:
    """Questions of the files beside a file of MC-MKE that ask whether an edit holds in the other modality."""

    def __init__(self, location: Location) -> None:
        self._questions: dict[tuple[str, Any], list[dict[str, Any]]] = {}
        for file in location.parent.glob("*consistency*.jsonl"):
            for entry in read_entries(file) if file.path != location.path else ():
                for key in INDICES if isinstance(entry.value, dict) else ():
                    if key in entry.value:
                        self._questions.setdefault((key, _hashable(entry.value[key])), []).append(entry.value)

    def added_to(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with its questions under the key `CONSISTENCY`."""
        found = [one for key in INDICES for one in self._questions.get((key, _hashable(record.get(key))), ())]
        return {**record, CONSISTENCY: found} if found else record


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return repr(value)[:1000]  # types of Parquet columns
