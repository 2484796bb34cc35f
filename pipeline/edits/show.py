"""`odedit show`: the worst edits of a run as a table, or one edit with its probes and its picture."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from PIL import Image
from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from odedit.data.images import ImageError, ImageReader
from odedit.errors import StorageError
from odedit.evaluation.statistics import SHOWN
from odedit.inputs.batch import is_locality
from pipeline.edits.listing import folded, lines_of, shared_question
from pipeline.report.formatting import number
from pipeline.run_folder.outcomes import (
    RANKED,
    EditOutcome,
    ProbeOutcome,
    picture_name,
    read_outcomes,
    worst_ids,
)  # fmt: skip
from pipeline.run_folder.rows import EDITED, parts, read_rows
from pipeline.run_folder.workspace import Workspace

LISTED = 20
"""Edits in the table."""
_PICTURE_COLUMNS = 40


def worst(workspace: Workspace) -> Table:
    """The edits of a run that are worst, one per line."""
    outcomes = read_outcomes(workspace, worst_ids(read_rows(parts(workspace), RANKED), LISTED), without=("losses",))
    owns = [outcome.probes[0] if outcome.probes else None for outcome in outcomes]
    shared = shared_question([None if own is None else own.prompt for own in owns])
    caption = f"odedit show {workspace.out} EDIT_ID shows one of them."
    table = lines_of(shared, ("wanted", "new answer"), caption, show_edge=False)
    for outcome, own in zip(outcomes, owns, strict=True):
        mean = outcome.mean_score
        picture = posixpath.basename(picture_name(own.image)) if own is not None and own.image is not None else ""
        table.add_row(
            folded(outcome.edit_id),
            Text(picture),
            *([Text((own and own.prompt) or "")] if shared is None else []),
            Text(outcome.old_answer or ""),
            Text((own and own.target) or ""),
            _answer(own, after=True) if own is not None and outcome.row["status"] == EDITED else _state(outcome),
            "" if mean is None else number(mean),
        )
    return table


def show(outcome: EditOutcome, reader: ImageReader | None, console: Console) -> None:
    """Prints one edit: question, answers, scores, its picture if the terminal can draw it, and its probes."""
    row = outcome.row
    console.print(Text.assemble((outcome.edit_id, "bold"), "  ", _state(outcome)))
    own = outcome.probes[0] if outcome.probes else None
    facts = Table.grid(padding=(0, 2))
    if own is not None:
        answers = [("before", _answer(own, after=False)), ("after", _answer(own, after=True))]
        facts.add_row("question", Text(own.prompt or ""))
        facts.add_row("old answer", Text(outcome.old_answer or "unknown"))
        facts.add_row("wanted", Text(own.target or ""))
        for name, text in answers if row["status"] == EDITED else ():
            facts.add_row(name, text)
        scores = [f"{name} {number(row[name])}" for name in SHOWN if row.get(name) is not None]
        scores += [f"{row['steps']} steps"] if row.get("steps") is not None else []
        if scores:
            facts.add_row("scores", "  ".join(scores))
        for link in _links(own, reader):
            facts.add_row("picture", link)
    console.print(facts)
    if row.get("error"):
        console.print(Text(row["error"], "red"))
    for picture in _pictures(own, reader, console):
        console.print(picture)
    if row["status"] == EDITED:
        console.print(_probes(outcome))


def _probes(outcome: EditOutcome) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for name in ("probe", "question", "wanted", "before", "after"):
        table.add_column(name, overflow="fold")
    table.add_column("score", justify="right")
    for probe in outcome.probes[1:]:
        if probe.score is None and probe.after is None:
            continue
        table.add_row(
            probe.name,
            Text(probe.prompt or ""),
            Text("" if is_locality(probe.name) else probe.target or "(another record's answer)"),
            _answer(probe, after=False),
            _answer(probe, after=True),
            "" if probe.score is None else number(probe.score),
        )
    return table


def _state(outcome: EditOutcome) -> Text:
    if outcome.row["status"] != EDITED:
        return Text(outcome.row["status"], "yellow")
    if outcome.holds is None:
        return Text("")
    return Text("✓ holds", "green") if outcome.holds else Text("✗ does not hold", "red")


def _answer(probe: ProbeOutcome, *, after: bool) -> Text:
    """An answer with its sign: right or wrong; for a locality probe unchanged or changed."""
    text, is_right = (probe.after, probe.is_right) if after else (probe.before, probe.was_right)
    if text is None:
        return Text("not kept", "dim")
    if is_right is None:
        return Text(text)
    signs = "=≠" if is_locality(probe.name) else "✓✗"
    return Text(f"{signs[not is_right]} {text}", "green" if is_right else "red")


def _links(probe: ProbeOutcome, reader: ImageReader | None) -> Iterator[Text]:
    """The picture's file, as a link where it is a file on this machine."""
    if probe.image is None:
        return
    name = picture_name(probe.image)
    try:
        location = None if reader is None else reader.location(probe.image.path, probe.image.root)
    except ImageError:
        location = None
    if location is None or not location.is_local:
        yield Text(name)
    else:
        yield Text(location.path, f"link file://{location.path}")


def _pictures(probe: ProbeOutcome | None, reader: ImageReader | None, console: Console) -> Iterator[RenderableType]:
    """The picture, if there is one and the terminal draws pictures (Kitty's protocol, or Sixel as iTerm2 has)."""
    if probe is None or probe.image is None or reader is None or not console.is_terminal:
        return
    # Asks the terminal when it is imported.
    from textual_image import renderable

    kinds = (renderable.SixelImage, renderable.TGPImage)
    if renderable.Image not in kinds:
        return
    try:
        pixels = reader.read(probe.image.path, probe.image.root).pixels
    except (ImageError, StorageError) as error:
        yield Text(str(error), "dim")
        return
    yield renderable.Image(Image.fromarray(pixels), width=_PICTURE_COLUMNS, height="auto")
