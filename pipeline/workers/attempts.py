"""Counts beside the results how often an edit was begun, so that one that ends its worker is not tried for ever.

Ray restarts a worker that dies and hands it the same group again, without end. So each begin is written down *before*
the work, and struck off after it. A group is first edited as a whole; after two tries that did not end, its edits
go one at a time, and one that was alone when its worker died often enough is given up.
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
        path: Where they are written down.
        max_attempts: Tries after which an edit is given up, those of the whole group included.
    """

    path: Location
    max_attempts: int
    whole: int = 0

    def __post_init__(self) -> None:
        self._whole_allowed = min(_WHOLE_ATTEMPTS, max(1, self.max_attempts - 1))
        self._single_allowed = max(1, self.max_attempts - self._whole_allowed)
        written = read_json(self.path) or {}
        self.whole = int(written.get("whole", 0))
        self._single: dict[str, int] = {str(key): int(value) for key, value in written.get("single", {}).items()}

    def begin_whole(self) -> bool:
        """Whether the group may be edited as a whole once more; if so, counts it."""
        if self.whole >= self._whole_allowed:
            return False
        self.whole += 1
        self._write()
        return True

    def begin_single(self, edit_id: str) -> bool:
        """Whether an edit may be tried alone once more; if so, counts it."""
        if self._single.get(edit_id, 0) >= self._single_allowed:
            return False
        self._single[edit_id] = self._single.get(edit_id, 0) + 1
        self._write()
        return True

    def end_single(self, edit_id: str) -> None:
        """The worker has survived this edit: it is not to blame for what comes after."""
        self._single.pop(edit_id, None)
        self._write()

    def attempts(self, edit_id: str) -> int:
        return self.whole + self._single.get(edit_id, 0)

    def close(self) -> None:
        """The group is done."""
        self.path.delete()

    def _write(self) -> None:
        write_json(self.path, {"whole": self.whole, "single": self._single})
