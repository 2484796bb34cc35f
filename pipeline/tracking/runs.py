"""The MLflow runs of an edit run and of a training: the logged values and their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Any, Self

from odedit.errors import in_words
from odedit.evaluation.statistics import SHOWN
from odedit.runtime.addresses import masked
from odedit.storage.location import Location
from odedit.ways.common.files import read_committed_info
from pipeline.config.run import RunConfig
from pipeline.config.values import flatten
from pipeline.run_folder.curves import mean_curves
from pipeline.run_folder.rows import EDITED, parts, read_rows, supervision_name
from pipeline.run_folder.workspace import STEP, Workspace
from pipeline.tracking import names, origin
from pipeline.tracking.client import Store, Table, Tracker, TrackingError
from pipeline.tracking.connection import store_uri

_TABLE_ROWS = 1000
_MOST_POINTS = 500
"""Points of a curve of a training."""
_TABLE_COLUMNS = (
    "edit_id",
    "status",
    "error",
    "prompt",
    "target",
    "answer_before",
    "answer_after",
    *SHOWN,
    "steps",
    "seconds",
)


@dataclass(frozen=True)
class Overview:
    """What a team sees of a run first.

    Attributes:
        description: Markdown.
        tables: Tables by the names of their artifacts.
        files: Further artifacts by their paths, such as pictures.
    """

    description: str
    tables: Mapping[str, Table]
    files: Mapping[str, bytes]


class EditRun(Tracker):
    """The MLflow run of an `odedit edit` run; a resumed run continues its MLflow run."""

    @classmethod
    def start(
        cls,
        config: RunConfig,
        workspace: Workspace,
        run_id: str | None,
        code: str,
        dataset: Mapping[str, Any],
        parent_run: str | None = None,
        command: str = "edit",
    ) -> Self:
        """Continues the run of that id, or creates one with its parameters and data set.

        Args:
            code: Version of the code.
            dataset: `path` and `digest` of the file of records, and the counts `usable` and `problems`.
            parent_run: Id of the run that a new one is nested in.
            command: Command that makes the run.

        Raises:
            InputError: The store cannot be reached.
        """
        store = Store.open(store_uri(config.tracking, workspace.out))
        if (resumed := cls.resume(store, run_id)) is not None:
            return resumed
        experiment = store.experiment(config.tracking.experiment)
        with cls.created(store, experiment, config.name, _tags(config, code, command), parent_run) as run:
            run.log_values(flatten(config.to_dict()))
            counts = {name: dataset[name] for name in ("usable", "problems")}
            run.log_dataset(origin.dataset(str(dataset["path"]), str(dataset["digest"]), counts))
        return run

    def log_results(
        self, config: RunConfig, workspace: Workspace, summary: Mapping[str, Any], overview: Overview
    ) -> None:
        """Logs metrics, curves, description, tables and files.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        try:
            self._log_metrics(summary)
            self.log_points(_curves(workspace, config.tracking.curves))
            self.describe(overview.description)
            self.log_files(overview.files)
            self.log_tables({**overview.tables, "edits_table.json": _edits_table(workspace)})
            for file in (workspace.config, workspace.summary, workspace.calibration, workspace.report):
                if file.exists():
                    self.log_file(file)
            for part in parts(workspace):
                self.log_file(part, "results")
            logged, left_out = self._log_edits(workspace, config.tracking.edits_gib)
            self.set_tags({"odedit.edits_logged": str(logged), "odedit.edits_left_out": str(left_out)})
        except Exception as error:
            raise TrackingError(
                f"MLflow at {masked(self.store.uri)} could not be written to ({in_words(error)}). The results are "
                f"complete in {workspace.out}; the same command, or `odedit mlflow sync {workspace.out}`, logs them "
                "once it can."
            ) from error

    def _log_metrics(self, summary: Mapping[str, Any]) -> None:
        self.log_points(names.at_step(names.of_run(summary)))

    def _log_edits(self, workspace: Workspace, max_gib: float) -> tuple[int, int]:
        """Logs the first edits, up to `max_gib` together; returns how many were logged and how many left out."""
        remaining, logged = max_gib * 2**30, 0
        # Names alone: there may be as many as records.
        names = [name for name in workspace.edits.names("*.safetensors") if not name.startswith(".")]
        for name in names:
            with (workspace.edits / name).local_copy() as path:
                remaining -= path.stat().st_size
                if remaining < 0:
                    break
                self.log_local_file(path, "edits")
            logged += 1
        return logged, len(names) - logged

    def finish_with(self, summary: Mapping[str, Any]) -> None:
        """Closes the run as FINISHED, or as FAILED if no record was edited."""
        self.finish("FINISHED" if summary["n"] else "FAILED")


def log_training(
    config: RunConfig,
    code: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    out: Location,
    notes: Mapping[str, str],
) -> str:
    """Logs the training of an editor's weights as one run; returns the address of the store.

    Args:
        code: Version of the code.
        curves: Steps and values by name.
        out: File of the weights.
        notes: Tags.

    Raises:
        TrackingError: The store refused; the weights themselves are complete.
    """
    uri = store_uri(config.tracking, out)
    try:
        store = Store.open(uri)
        experiment = store.experiment(config.tracking.experiment)
        name = config.tracking.run_name or f"train-{out.stem}"
        with Tracker.created(store, experiment, name, _tags(config, code, "train") | dict(notes)) as run:
            run.log_values(flatten(config.to_dict()))
            run.log_points((name, value, step) for name, curve in curves.items() for step, value in _thinned(curve))
            run.finish("FINISHED")
    except Exception as error:
        raise TrackingError(
            f"MLflow at {masked(uri)} could not be written to ({in_words(error)}). The weights are complete: {out}."
        ) from error
    return uri


def _curves(workspace: Workspace, max_edits: int) -> Iterator[names.Point]:
    """Losses over the first edits, or of the training of a committed model."""
    if max_edits:
        rows = read_rows(parts(workspace), ("status", "losses"), (EDITED,))
        yield from names.of_curves(mean_curves(rows, max_edits, names.MOST_TERMS))
    if workspace.committed.exists():
        trained = read_committed_info(workspace.committed).details.get("curves") or {}
        steps = trained.get(STEP) or []
        curves = {name: values for name, values in trained.items() if name != STEP and any(values)}
        for name, values in islice(curves.items(), names.MOST_TERMS):
            numbers = map(int, steps) if len(steps) == len(values) else range(len(values))
            points = [pair for pair in zip(numbers, values, strict=True) if isfinite(pair[1])]
            yield from ((names.CURVES + name, value, step) for step, value in _thinned(points))


def _thinned(curve: Sequence[tuple[int, float]]) -> Iterable[tuple[int, float]]:
    """At most `_MOST_POINTS` points of a curve, the last one included."""
    stride = -(-len(curve) // _MOST_POINTS)
    return [*curve[: -1 : max(1, stride)], *curve[-1:]]


def _edits_table(workspace: Workspace) -> Table:
    rows = islice(read_rows(parts(workspace), _TABLE_COLUMNS), _TABLE_ROWS)
    return Table(_TABLE_COLUMNS, [[row.get(name) for name in _TABLE_COLUMNS] for row in rows])


def _tags(config: RunConfig, code: str, command: str) -> dict[str, str]:
    return origin.tags(command) | {
        "odedit.version": code,
        "odedit.editor": config.editor.name,
        "odedit.objective": config.objective.name,
        "odedit.backbone": config.backbone.name,
        "odedit.supervision": supervision_name(config),
    }
