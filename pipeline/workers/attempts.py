"""A count of attempts on disk, so that an edit that kills its worker is given up.

Ray restarts a worker that dies and hands it the same group again, without end. So each attempt is written *before* the
work and deleted after it. A group is first edited as a whole. After two attempts that killed the worker, its edits run
one at a time, and an edit that kills the worker too often is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

from odedit.storage.location import Location
from pipeline.run_folder.workspace import read_json, write_json

_WHOLE_ATTEMPTS = 2


@dataclass
class Ledger:
    """The attempts at one group.

    Attributes:
        path: File of the counts.
        max_attempts: Number of attempts after which an edit is given up, attempts at its whole group included.
        whole: Number of attempts at the whole group so far.
    """

    path: Location
    max_attempts: int
    whole: int = 0

    def __post_init__(self) -> None:
        self._whole_allowed = min(_WHOLE_ATTEMPTS, max(1, self.max_attempts - 1))
        self._single_allowed = max(1, self.max_attempts - self._whole_allowed)
        counts = read_json(self.path) or {}
        self.whole = int(counts.get("whole", 0))
        self._single: dict[str, int] = {str(key): int(value) for key, value in counts.get("single", {}).items()}

    def begin_whole(self) -> bool:
        """Counts an attempt at the whole group; False if there were too many."""
        if self.whole >= self._whole_allowed:
            return False
        self.whole += 1
        self._write()
        return True

    def begin_single(self, edit_id: str) -> bool:
        """Counts an attempt at one edit; False if there were too many."""
        if self._single.get(edit_id, 0) >= self._single_allowed:
            return False
        self._single[edit_id] = self._single.get(edit_id, 0) + 1
        self._write()
        return True

    def end_single(self, edit_id: str) -> None:
        """Forgets the attempts at an edit that its worker has survived."""
        self._single.pop(edit_id, None)
        self._write()

    def attempts(self, edit_id: str) -> int:
        """Number of attempts at an edit, alone or with its group."""
        return self.whole + self._single.get(edit_id, 0)

    def close(self) -> None:
        """Deletes the counts of a finished group."""
        self.path.delete()

    def _write(self) -> None:
        write_json(self.path, {"whole": self.whole, "single": self._single})
