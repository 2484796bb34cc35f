"""`odedit edits`: the edits of a committed model as a table, worst first, or as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from odedit.evaluation.statistics import SHOWN
from pipeline.report.formatting import number
from pipeline.run_folder.committed import Entry

_TEXTS = ("edit_id", "prompt", "answer_before", "target", "answer_after")
_FIELDS = (
    "edit_id", "holds", "status", "error", "fact", "file", "index", "task", "prompt", "image", "answer_before",
    "target", "answer_after",
)  # fmt: skip


def table(listed: Sequence[Entry]) -> Table:
    """A line per edit: question, answers, whether it holds, and the main scores."""
    held = sum(entry["holds"] for entry in listed)
    made = Table(box=SIMPLE, pad_edge=False, caption=f"{held} of {len(listed)} hold.", caption_justify="left")
    for name in ("edit", "question", "old answer", "new answer", "answer now", "holds"):
        made.add_column(name, overflow="fold")
    shown = [name for name in SHOWN if any(name in entry["scores"] for entry in listed)]
    for name in shown:
        made.add_column(name, justify="right", no_wrap=True)
    for entry in listed:
        texts = [_plain(entry[name]) for name in _TEXTS]
        scores = [number(entry["scores"][name]) if name in entry["scores"] else "" for name in shown]
        made.add_row(*texts, "yes" if entry["holds"] else "no", *scores)
    return made


def _plain(value: object) -> str:
    return "" if value is None else escape(str(value))


def to_csv(listed: Sequence[Entry]) -> str:
    """A header and a line per edit, with all scores."""
    scores = sorted({name for entry in listed for name in entry["scores"]} - set(SHOWN))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_FIELDS, *SHOWN, *scores])
    for entry in listed:
        values = [entry[name] for name in _FIELDS]
        writer.writerow([*values, *(entry["scores"].get(name) for name in (*SHOWN, *scores))])
    return stream.getvalue()
