"""`odedit edits`: the edits of a committed model as a table, worst first, or as CSV."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from odedit.evaluation.statistics import SHOWN
from pipeline.report.formatting import number
from pipeline.run_folder.committed import Entry
from pipeline.run_folder.outcomes import mean_score

_LONGEST_ID = 22
_FIELDS = (
    "edit_id", "holds", "status", "error", "fact", "file", "index", "task", "prompt", "image", "answer_before",
    "target", "answer_after",
)  # fmt: skip


def table(listed: Sequence[Entry]) -> Table:
    """A line per edit: picture, question, answers, whether it holds (✓), and the mean of its scores.

    A question that all edits share is in the title.
    """
    held = sum(entry["holds"] for entry in listed)
    shared = shared_question([entry["prompt"] for entry in listed])
    made = lines_of(shared, ("new answer", "answer now"), f"{held} of {len(listed)} hold (✓).")
    for entry in listed:
        texts = [folded(entry["edit_id"]), posixpath.basename(entry["image"] or "")]
        texts += [entry["prompt"]] if shared is None else []
        texts += [entry["answer_before"], entry["target"]]
        now = ("✓" if entry["holds"] else "✗") + f" {_plain(entry['answer_after'])}"
        mean = mean_score(entry["scores"])
        made.add_row(*map(_plain, texts), now, "" if mean is None else number(mean))
    return made


def lines_of(shared: str | None, answers: Sequence[str], caption: str, *, show_edge: bool = True) -> Table:
    """An empty table of edits: id, picture, question, old answer, further answers, and the mean of the scores.

    Args:
        shared: The question of all edits, which is then the title and no column.
        answers: Heads of the columns of further answers.
    """
    made = Table(
        box=SIMPLE,
        pad_edge=False,
        show_edge=show_edge,
        collapse_padding=True,
        title=None if shared is None else Text(f"Question: {shared}"),
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    made.add_column("edit", no_wrap=True)
    for name in ("picture", *(["question"] if shared is None else []), "old answer", *answers):
        made.add_column(name, overflow="fold")
    made.add_column("mean", justify="right", no_wrap=True)
    return made


def shared_question(questions: Sequence[str | None]) -> str | None:
    """The question of all edits; None if there are several, or a single edit."""
    return questions[0] if len(questions) > 1 and len(set(questions)) == 1 else None


def folded(edit_id: str) -> str:
    """An id in lines that leave room for the other columns of a narrow terminal."""
    return "\n".join(edit_id[start : start + _LONGEST_ID] for start in range(0, len(edit_id), _LONGEST_ID))


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
