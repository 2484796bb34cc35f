"""What is damaged is found when a run is resumed, and made again.

No kill leaves half a file, since every file appears whole or not at all; a machine that loses its power may, or a disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow
from pyarrow import parquet

from odedit.editing.files import is_whole
from odedit.errors import listed
from odedit.storage.location import Location
from pipeline.run_folder import rows as results
from pipeline.run_folder.staging import Staged
from pipeline.run_folder.workspace import Workspace, read_json

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""As `odedit.storage.atomic.temporary_beside` names them."""


def repair(workspace: Workspace, staged: Staged, *, keep_edits: bool) -> str | None:
    """Deletes result files that cannot be read, and the rows of groups with an edit that cannot: both are done again.

    Every result file is read once, and of every edit the header.

    Args:
        keep_edits: Whether the run's edits are files.

    Returns:
        What was found, in a sentence; None if all is well.
    """
    state = read_json(workspace.calibration)
    if not (isinstance(state, dict) and "sigma2_0" in state):
        workspace.calibration.delete()  # the same value is measured again
    there = _edits_there(workspace) if keep_edits else lambda edit_id: True
    names: list[str] = []
    groups: set[int] = set()
    for path in _every_part(workspace):
        first, last = results.groups_of(path)
        numbers = np.array([group for group in range(first, last + 1) for _ in range(staged.size(group))], dtype=int)
        rows = _read(path)
        if rows is None or len(rows) != len(numbers):
            names.append(path.name)
            groups.update(range(first, last + 1))
            path.delete()
            continue
        lost = {
            edit_id: int(group)
            for (edit_id, status), group in zip(rows, numbers, strict=True)
            if status == results.EDITED and not there(edit_id)
        }
        if lost:
            names += [workspace.edit(edit_id).name for edit_id in lost]
            groups.update(lost.values())
            results.take_out(workspace, path, numbers, set(lost.values()))
    return _sentence(names, len(groups)) if names else None


def _edits_there(workspace: Workspace) -> Callable[[str], bool]:
    """Whether an edit's file is there, and on this machine whole; an object store has it whole or not at all."""
    if workspace.edits.is_local:
        return lambda edit_id: is_whole(workspace.edit(edit_id))
    names = set(workspace.edits.names())
    return lambda edit_id: workspace.edit(edit_id).name in names


def _every_part(workspace: Workspace) -> Iterator[Location]:
    """The result files, also those that come to light when the larger one that has their rows is deleted."""
    seen: set[str] = set()
    while new := [path for path in results.parts(workspace) if path.name not in seen]:
        seen.update(path.name for path in new)
        yield from new


def _read(path: Location) -> list[tuple[str, str]] | None:
    """Id and status of every row; None if any part of the file is damaged. Raises OSError if it cannot be read."""
    data = path.read_bytes()  # in a step of its own: what a storage refuses may be well
    try:
        with parquet.ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read()
            columns = [table.column(name).to_pylist() for name in ("edit_id", "status")]
    except (pyarrow.ArrowException, KeyError, OSError):
        return None
    return list(zip(*columns, strict=True))


def _sentence(names: Sequence[str], num_groups: int) -> str:
    again = "1 group of edits is" if num_groups == 1 else f"{num_groups} groups of edits are"
    return f"Damaged or missing: {listed(names)}. {again} done again."


def remove_temporaries(workspace: Workspace) -> None:
    """Deletes what writers left that were killed while they wrote; for when none is at work."""
    if not workspace.out.is_local:
        return
    for folder in (workspace.out, workspace.results, workspace.edits, workspace.attempts):
        for path in folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                path.delete()
