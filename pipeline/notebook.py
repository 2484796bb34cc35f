"""Finished runs in a notebook: `odedit.open_run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from odedit.data.images import ImageError, ImageReader
from odedit.errors import InputError, StorageError
from odedit.evaluation.statistics import SHOWN, Estimate
from odedit.inputs.batch import is_locality
from odedit.inputs.html import thumbnail
from pipeline.report.formatting import LABELS
from pipeline.report.page import counts
from pipeline.report.templates import environment
from pipeline.run_folder.outcomes import (
    RANKED,
    EditOutcome,
    ProbeOutcome,
    find_outcome,
    picture_name,
    picture_reader,
    read_outcomes,
    worst_ids,
)  # fmt: skip
from pipeline.run_folder.reasons import sentences
from pipeline.run_folder.rows import EDITED, parts, read_rows, to_pandas
from pipeline.run_folder.summary import finished_run
from pipeline.run_folder.workspace import Workspace

if TYPE_CHECKING:
    import pandas

_SHOWN = 3


def open_run(folder: str) -> Run:
    """Opens the folder of a finished run, of `odedit edit`, `commit` or `score`.

    Args:
        folder: Path or address (`out`).

    Raises:
        InputError: There is no run, or it is not finished.
    """
    workspace, summary = finished_run(str(folder), "folder")
    return Run(workspace, summary)


@dataclass(frozen=True)
class Run:
    """A finished run. A notebook shows its scores and its worst edits.

    Attributes:
        workspace: Its folder.
        summary: Content of `summary.json`: numbers of records, means with intervals, commonest reasons.
    """

    workspace: Workspace
    summary: Mapping[str, Any]

    def to_pandas(self, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """The result rows, one per record; `pipeline/README.md` lists the columns.

        Args:
            columns: Columns to read; None: all. `losses` and `answers` are dictionaries.

        Raises:
            InputError: A column does not exist.
        """
        return to_pandas(self.workspace, columns)

    def edit(self, edit_id: str) -> RunEdit:
        """One edit with its probes. Raises InputError if there is none of that id."""
        return RunEdit.of(find_outcome(self.workspace, edit_id), picture_reader(self.workspace))

    def worst(self, count: int = 20) -> list[RunEdit]:
        """The worst edits: those that do not hold, then the others, each by their mean score."""
        ids = worst_ids(read_rows(parts(self.workspace), RANKED), count)
        reader = picture_reader(self.workspace)
        return [RunEdit.of(outcome, reader) for outcome in read_outcomes(self.workspace, ids)]

    def __repr__(self) -> str:
        return f"Run({str(self.workspace.out)!r}: {counts(self.summary)})"

    def _repr_html_(self) -> str:
        means = [
            (name, LABELS[name], Estimate(**self.summary["metrics"][name]))
            for name in SHOWN
            if name in self.summary["metrics"]
        ]
        return str(
            _template("run")(
                folder=str(self.workspace.out),
                counts=counts(self.summary),
                means=means,
                reasons=sentences(self.summary.get("reasons", [])),
                edits=[each.view() for each in self.worst(_SHOWN)],
            )
        )


@dataclass(frozen=True, repr=False)
class RunEdit(EditOutcome):
    """One edit of a run. A notebook shows its questions, pictures and answers."""

    reader: ImageReader | None = field(default=None, compare=False)

    @classmethod
    def of(cls, outcome: EditOutcome, reader: ImageReader | None) -> RunEdit:
        return cls(outcome.row, outcome.old_answer, outcome.probes, reader)

    def __repr__(self) -> str:
        state = {True: "holds", False: "does not hold", None: self.row["status"]}[self.holds]
        answer = self.probes[0].after if self.probes else None
        return f"RunEdit({self.edit_id!r}: {state}{'' if answer is None else f', {answer!r}'})"

    def _repr_html_(self) -> str:
        return str(_template("edit")(self.view()))

    def view(self) -> dict[str, Any]:
        """Values of the template."""
        return {
            "id": self.edit_id,
            "status": self.row["status"],
            "error": self.row.get("error"),
            "holds": self.holds,
            "old": self.old_answer,
            "probes": [self._probe(probe) for probe in self.probes] if self.row["status"] == EDITED else [],
        }

    def _probe(self, probe: ProbeOutcome) -> dict[str, Any]:
        kept = is_locality(probe.name)
        return {
            "name": probe.name,
            "prompt": probe.prompt,
            "target": None if kept else probe.target,
            "picture": self._picture(probe),
            "file": None if probe.image is None else picture_name(probe.image),
            "before": (probe.before, probe.was_right),
            "after": (probe.after, probe.is_right),
            "signs": ("≠", "=") if kept else ("✗", "✓"),
            "score": probe.score,
        }

    def _picture(self, probe: ProbeOutcome) -> str | None:
        """Thumbnail in base64; None without a picture, or if it is not there any more."""
        if probe.image is None or self.reader is None:
            return None
        try:
            return thumbnail(self.reader.read(probe.image.path, probe.image.root).pixels)
        except (ImageError, StorageError, InputError):
            return None


def _template(name: str) -> Any:
    return getattr(environment().get_template("notebook.html.j2").module, name)
