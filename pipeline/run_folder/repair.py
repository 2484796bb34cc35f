"""Finds damaged files when a run is resumed, and deletes them so that their groups run again.

A killed process leaves no partial file, because writes are atomic; a power failure or a faulty disk may.
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
from pipeline.run_folder.rows import EDITED, drop_groups, groups_of, parts
from pipeline.run_folder.staging import Staged
from pipeline.run_folder.workspace import Workspace, read_json

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names given by `odedit.storage.atomic.temporary_beside`."""


def repair(workspace: Workspace, staged: Staged, *, keep_edits: bool) -> str | None:
    """Deletes unreadable result files, and the rows of groups with an unreadable edit; these groups run again.

    Reads every result file, and the header of every edit.

    Args:
        keep_edits: Whether the run writes its edits to files.

    Returns:
        A sentence that names the damaged files, or None.
    """
    state = read_json(workspace.calibration)
    if not (isinstance(state, dict) and "sigma2_0" in state):
        workspace.calibration.delete()
    is_intact = _intact_edits(workspace) if keep_edits else lambda edit_id: True
    damaged_names: list[str] = []
    damaged_groups: set[int] = set()
    for path in _every_part(workspace):
        first, last = groups_of(path)
        group_of_row = np.repeat(np.arange(first, last + 1), [staged.size(group) for group in range(first, last + 1)])
        rows = _read(path)
        if rows is None or len(rows) != len(group_of_row):
            damaged_names.append(path.name)
            damaged_groups.update(range(first, last + 1))
            path.delete()
            continue
        damaged = {
            edit_id: int(group)
            for (edit_id, status), group in zip(rows, group_of_row, strict=True)
            if status == EDITED and not is_intact(edit_id)
        }
        if damaged:
            damaged_names += [workspace.edit(edit_id).name for edit_id in damaged]
            damaged_groups.update(damaged.values())
            drop_groups(workspace, path, group_of_row, set(damaged.values()))
    return _sentence(damaged_names, len(damaged_groups)) if damaged_names else None


def _intact_edits(workspace: Workspace) -> Callable[[str], bool]:
    """A test whether an edit's file exists and, on a local disk, is complete. Object stores have no partial files."""
    if workspace.edits.is_local:
        return lambda edit_id: is_whole(workspace.edit(edit_id))
    names = set(workspace.edits.names())
    return lambda edit_id: workspace.edit(edit_id).name in names


def _every_part(workspace: Workspace) -> Iterator[Location]:
    """The result files. Deleting a gathered file uncovers the files of its groups, if they still exist."""
    seen: set[str] = set()
    while new := [path for path in parts(workspace) if path.name not in seen]:
        seen.update(path.name for path in new)
        yield from new


def _read(path: Location) -> list[tuple[str, str]] | None:
    """Id and status of every row, or None if the file is damaged. Raises OSError if the storage fails."""
    data = path.read_bytes()  # outside the try: an error of the storage is no damage
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
    """Deletes the temporary files of killed writers. No writer may be running."""
    if not workspace.out.is_local:
        return
    for folder in (workspace.out, workspace.results, workspace.edits, workspace.attempts):
        for path in folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                path.delete()
