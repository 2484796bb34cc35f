"""Progress on standard error: a live view on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from odedit.errors import counted
from odedit.evaluation.statistics import SHOWN
from pipeline.console import say
from pipeline.report.formatting import LABELS
from pipeline.run_folder.rows import EDITED, FAILED, SKIPPED, Row

_LOG_EVERY_S = 10.0
_STEADY_AFTER_S = 5.0
_BAR_COLUMNS = 20


class Progress:
    """Counts of finished, failed and skipped records, and running means of the five metrics.

    Args:
        console: Console for the lines.
        total: Number of records in the whole run.
        workers: Number and kind of the workers, for the live view.
        waits_for: Work before the first record, for the live view.
    """

    def __init__(self, console: Console, total: int, workers: str = "", waits_for: str = "starting workers") -> None:
        self._console = console
        self._total = total
        self._workers, self._waits_for = workers, waits_for
        self._done = self._before = 0
        self._left_out = {FAILED: 0, SKIPPED: 0}
        self._sums = dict.fromkeys(SHOWN, 0.0)
        self._counts = dict.fromkeys(SHOWN, 0)
        self._started = time.monotonic()
        self._first: float | None = None
        self._first_done = 0
        self._last_logged = self._started
        live = Live(console=console, get_renderable=self.view, refresh_per_second=4, transient=True)
        self._live = live if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        say(self._console, self.line())

    def observe(self, rows: Iterable[Row]) -> None:
        """Adds the rows of a newly finished group, and shows the progress."""
        self._add(rows)
        now = time.monotonic()
        if self._first is None:
            self._first, self._first_done = now, self._done
        if self._live is None and now - self._last_logged >= _LOG_EVERY_S:
            self._last_logged = now
            say(self._console, self.line())

    def include(self, rows: Iterable[Row]) -> None:
        """Adds the rows of an earlier part of the run, which do not count for the speed."""
        self._add(rows)
        self._before = self._done

    def _add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._done += 1
            if row["status"] in self._left_out:
                self._left_out[row["status"]] += 1
            for metric in SHOWN if row["status"] == EDITED else ():
                if isinstance(row.get(metric), float):
                    self._sums[metric] += row[metric]
                    self._counts[metric] += 1

    def view(self) -> RenderableType:
        """The live view: a bar, the counts by status, running means with a bar each, speed and workers."""
        edited = self._done - sum(self._left_out.values())
        counts = "   ".join(f"{count} {status}" for status, count in {EDITED: edited, **self._left_out}.items())
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(max(self._total, 1), self._done, width=_BAR_COLUMNS),
            Text(f"{self._done} of {counted(self._total, 'record')}   {counts}"),
        )
        means = Table.grid(padding=(0, 2))
        for metric, mean in self._means().items():
            bar = ProgressBar(1.0, mean, width=_BAR_COLUMNS, finished_style="bar.complete")
            means.add_row(Text(metric), Text(f"{mean:.3f}"), bar, Text(LABELS[metric], "dim"))
        speed = self._speed() or ("" if self._first else self._waits_for)
        return Group(head, means, *(Text(line) for line in (speed, self._workers) if line))

    def _means(self) -> dict[str, float]:
        return {metric: self._sums[metric] / count for metric, count in self._counts.items() if count}

    def line(self) -> str:
        """`24/48 records (1 failed, 2 skipped)  rel .981  t_gen ...  2.1 records/s  12 s left`."""
        means = "  ".join(f"{metric} {mean:.3f}" for metric, mean in self._means().items())
        left_out = ", ".join(f"{count} {status}" for status, count in self._left_out.items() if count)
        done = f"{self._done}/{counted(self._total, 'record')}" + (f" ({left_out})" if left_out else "")
        pieces = [done, means, self._speed()]
        return "  ".join(piece for piece in pieces if piece)

    def _speed(self) -> str:
        now = time.monotonic()
        if self._first is not None and now - self._first > _STEADY_AFTER_S and self._done > self._first_done:
            # The time until the first group includes starting the workers.
            since, done = self._first, self._done - self._first_done
        elif self._before < self._done == self._total:
            since, done = self._started, self._done - self._before
        else:
            return ""
        rate = done / max(now - since, 1e-6)
        left = max(self._total - self._done, 0) / rate
        return f"{rate:.2f} records/s" + (f"  {duration(left)} left" if left else "")


class Steps:
    """Progress of a work of several stages, each with a number of steps.

    Args:
        console: Console for the lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._began, self._first = time.monotonic(), 0
        self._line = self._logged = ""
        self._last_logged = self._began
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Steps:
        if self._live is not None:
            self._live.start()
            self._live.update(Text("starting workers"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self._log()

    def observe(self, stage: str, number: int, total: int, figures: Mapping[str, float]) -> None:
        """Shows step `number` of `total` of a stage, with its figures."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, number
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        rate = (number - self._first) / max(now - self._began, 1e-6)
        left = f"{duration((total - number) / rate)} left" if rate > 0 and number < total else ""
        self._line = "  ".join(part for part in (f"{stage} {number}/{total}", shown, left) if part)
        if self._live is not None:
            self._live.update(Text(self._line))
        elif now - self._last_logged >= _LOG_EVERY_S:
            self._last_logged = now
            self._log()

    def _log(self) -> None:
        """Prints the line unless it was printed last: the same step is shown again and again while it goes on."""
        if self._line != self._logged:
            self._logged = self._line
            say(self._console, self._line)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds.

    >>> duration(59.6), duration(7260)
    ('1 min 0 s', '2 h 1 min')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
