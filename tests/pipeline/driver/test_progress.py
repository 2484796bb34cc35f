"""Progress of a run: the live view of a terminal, and plain lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pipeline.driver.progress import Progress, Steps


def test_the_live_view_has_counts_means_speed_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("pipeline.driver.progress.time.monotonic", lambda: clock[0])
    console = Console(width=100, record=True, file=io.StringIO())
    progress = Progress(console, total=40, workers="2 actors on cpu")
    console.print(progress.view())
    assert "0 of 40 records" in (begun := console.export_text()) and "starting workers" in begun
    row = {"status": "edited", "rel": 1.0, "t_gen": 0.5, "m_gen": None}
    progress.observe([row] * 4)
    clock[0] += 10.0
    progress.observe([row | {"rel": 0.0}] * 4 + [{"status": "failed"}, {"status": "skipped"}])
    console.print(progress.view())
    text = console.export_text()
    assert "10 of 40 records   8 edited   1 failed   1 skipped" in text
    assert re.search(r"rel +0.500 .*reliability", text) and re.search("t_gen +0.500", text) and "m_gen" not in text
    assert "0.60 records/s  50 s left" in text and "2 actors on cpu" in text


def test_without_a_terminal_progress_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("pipeline.driver.progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    console = Console(width=60, file=stream)
    with Progress(console, total=3) as progress:
        for _ in range(3):
            clock[0] += 11.0
            progress.observe([{"status": "edited", "rel": 1.0}])
    written = stream.getvalue()
    assert written.splitlines()[0] == "1/3 records  rel 1.000" and "\x1b" not in written
    assert written.splitlines()[-1].startswith("3/3 records  rel 1.000")


def test_a_step_that_goes_on_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("pipeline.driver.progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Steps(Console(width=60, file=stream)) as steps:
        for number in (1, 2, 2, 2):
            clock[0] += 11.0
            steps.observe("solving layers.3.ffn.out", number, 2, {})
    assert stream.getvalue().splitlines() == ["solving layers.3.ffn.out 1/2", "solving layers.3.ffn.out 2/2"]
