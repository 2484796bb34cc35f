"""Validation records of a search, in one order for all trials, with tasks and facts spread evenly over the rungs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow

from odedit.data.records import RawRecord
from odedit.errors import InputError
from odedit.storage.location import Location
from pipeline.config.run import RunConfig
from pipeline.run_folder import staging
from pipeline.run_folder.sources import Sources
from pipeline.run_folder.workspace import Workspace, write_table

Group = list[RawRecord]


@dataclass(frozen=True)
class TrialWorkspace(Workspace):
    """The folder of a trial, with the records of the search."""

    shared: Location

    @property
    def records(self) -> Location:
        return self.shared / "rungs.parquet"

    @property
    def pool(self) -> Location:
        return self.shared / "pool.parquet"

    def rung(self, index: int) -> Location:
        """Report of a finished rung."""
        return self.out / f"rung-{index}.json"


def stage(config: RunConfig, sources: Sources, folder: Location, sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Writes the records of all rungs in groups; returns the group numbers of each rung.

    Raises:
        InputError: The records cannot be read, or there are too few.
    """
    workspace = Workspace(folder)
    folder.make_folder()
    try:
        staged = staging.stage(config, sources, workspace)
    except InputError as error:
        raise InputError(f"validation: {error}") from error
    if staged.num_usable < sizes[-1]:
        raise InputError(
            f"rungs: the last one takes {sizes[-1]} validation records, and there are {staged.num_usable} that can be "
            f"used ({staged.problems} cannot). Lower rungs.edits, factor or number, or name more in validation.path."
        )
    chosen = ordered(list(staging.usable_records(workspace.records)), seed)
    rungs: list[list[int]] = []
    rows = []
    number = 0
    for first, end in zip((0, *sizes), sizes, strict=False):
        of_rung = []
        for start in range(first, end, config.pipeline.batch_size):
            group = chosen[start : min(start + config.pipeline.batch_size, end)]
            rows += [record.to_row() | {"group": number} for record in group]
            of_rung.append(number)
            number += 1
        rungs.append(of_rung)
    table = pyarrow.Table.from_pylist(rows, schema=staging.STAGED_SCHEMA)
    write_table(TrialWorkspace(folder, folder).records, table)
    return rungs


def ordered(records: Sequence[RawRecord], seed: int) -> list[RawRecord]:
    """The records in an order whose every prefix has the tasks in proportion and as many facts as possible.

    The order depends on ids and `seed`, not on the order of the file.
    """

    def drawn(text: str) -> bytes:
        return hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()

    turns: dict[tuple[str, str], int] = {}
    by_task: dict[str, list[tuple[int, bytes, RawRecord]]] = {}
    for record in sorted(records, key=lambda record: drawn(record.edit_id)):
        fact = str(record.fields.get("fact") or record.edit_id)
        turn = turns.get((record.task, fact), 0)
        turns[record.task, fact] = turn + 1
        by_task.setdefault(record.task, []).append((turn, drawn(fact), record))
    positions = []
    for task, of_task in sorted(by_task.items()):
        of_task.sort(key=lambda item: item[:2])
        positions += [((index + 0.5) / len(of_task), task, record) for index, (_, _, record) in enumerate(of_task)]
    return [record for _, _, record in sorted(positions, key=lambda item: item[:2])]
