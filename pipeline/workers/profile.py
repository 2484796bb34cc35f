"""A run's profile: seconds by stage, summed over all preparers and all editing workers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.table import Table

from odedit.errors import counted
from odedit.runtime.stages import Account, measured

PREPARE, EDIT = "prepare", "edit"
WAITING = "wait for the next group"
LOADING = "start: model, measurements"
OTHER = "other"


class Clock:
    """Times one worker's calls by stage, and the waiting between them."""

    def __init__(self) -> None:
        self._free_since: float | None = None

    @contextmanager
    def call(self) -> Iterator[Account]:
        """Inside, stages are timed; the account includes the time that the worker waited for this call."""
        began = time.perf_counter()
        with measured() as account:
            if self._free_since is not None:
                account.seconds[WAITING] = began - self._free_since
            yield account
        self._free_since = time.perf_counter()


@dataclass
class Profile:
    """Time of the workers by stage.

    Attributes:
        seconds: Seconds by kind of worker and stage.
        records: Number of records.
    """

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    records: int = 0

    def add(self, seconds: Mapping[str, Mapping[str, float]], records: int) -> None:
        """Adds the seconds of a group, by kind of worker and stage."""
        self.records += records
        for kind, stages in seconds.items():
            totals = self.seconds.setdefault(kind, {})
            for stage, value in stages.items():
                totals[stage] = totals.get(stage, 0.0) + value

    def table(self) -> Table:
        """A row for each stage: seconds, share of the time of its kind of worker, milliseconds per record."""
        table = Table(title=f"Where the time went, {counted(self.records, 'record')}", title_justify="left")
        table.add_column("workers")
        table.add_column("stage")
        for name in ("seconds", "share", "ms per record"):
            table.add_column(name, justify="right")
        for kind, stages in self.seconds.items():
            total = sum(stages.values())
            for stage, value in _in_order(stages):
                share = f"{value / total:.1%}" if total else ""
                table.add_row(kind, stage, f"{value:.2f}", share, f"{1000 * value / max(self.records, 1):.1f}")
            table.add_section()
        return table

    def to_json(self) -> dict[str, object]:
        """The content of `profile.json`."""
        return {"records": self.records, "seconds": self.seconds}


def _in_order(stages: Mapping[str, float]) -> list[tuple[str, float]]:
    """Stages by descending time, waiting last."""
    return sorted(stages.items(), key=lambda item: (item[0] == WAITING, -item[1]))
