"""The MLflow runs of an edit run and of a training: the logged values and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Self

from odedit.errors import in_words
from odedit.evaluation.columns import HIGH, LOW, column
from odedit.evaluation.statistics import SHOWN
from odedit.runtime.addresses import masked
from odedit.storage.location import Location
from pipeline.config.run import RunConfig
from pipeline.config.values import flatten
from pipeline.run_folder.reasons import sentences
from pipeline.run_folder.rows import EDITED, parts, read_rows, supervision_name
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking.client import Store, Tracker, TrackingError, store_uri

_TABLE_ROWS = 1000
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
    ) -> Self:
        """Continues the run of that id, or creates one with its parameters and data set.

        Args:
            code: Version of the code.
            dataset: `path` and `digest` of the file of records, and the counts `usable` and `problems`.
            parent_run: Id of the run that a new one is nested in.

        Raises:
            InputError: The store cannot be reached.
        """
        store = Store.open(store_uri(config.tracking, workspace.out))
        if (resumed := cls.resume(store, run_id)) is not None:
            return resumed
        experiment = store.experiment(config.tracking.experiment)
        run = cls.create(store, experiment, config.name, _tags(config, code), parent_run)
        run.log_values(flatten(config.to_dict()))
        counts = {name: dataset[name] for name in ("usable", "problems")}
        run.log_dataset(str(dataset["path"]), str(dataset["digest"]), counts)
        return run

    def log_results(self, config: RunConfig, workspace: Workspace, summary: Mapping[str, Any]) -> None:
        """Logs metrics and intervals, loss curves of the first edits, tables and files.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        try:
            self._log_metrics(summary)
            self._log_losses(workspace, config.tracking.curves)
            self._log_table(workspace)
            for file in (workspace.config, workspace.summary, workspace.calibration, workspace.report):
                if file.exists():
                    self.log_file(file)
            for part in parts(workspace):
                self.log_file(part, "results")
            logged, left_out = self._log_edits(workspace, config.tracking.edits_gib)
            if reasons := sentences(summary.get("reasons", [])):
                self.set_tags({"odedit.reasons": "\n".join(reasons)})
            self.set_tags({"odedit.edits_logged": str(logged), "odedit.edits_left_out": str(left_out)})
        except Exception as error:
            raise TrackingError(
                f"MLflow at {masked(self.store.uri)} could not be written to ({in_words(error)}). The results are "
                f"complete in {workspace.out}; the same command, or `odedit mlflow sync {workspace.out}`, logs them "
                "once it can."
            ) from error

    def _log_metrics(self, summary: Mapping[str, Any]) -> None:
        values: dict[str, float] = {name: float(summary[name]) for name in ("n", "failed", "skipped")}
        kept = {name: summary[name] for name in ("kept", "kept_text") if name in summary}
        for name, figure in (summary["metrics"] | kept).items():
            values |= {
                name: figure["mean"],
                column(name, LOW): figure["low"],
                column(name, HIGH): figure["high"],
            }
        self.log_points((name, value, 0) for name, value in values.items())

    def _log_losses(self, workspace: Workspace, num_edits: int) -> None:
        """Logs the loss curves of the first edits that worked."""
        columns = ("edit_id", "status", "losses")
        rows = read_rows(parts(workspace), columns)
        edited = (row for row in rows if row["status"] == EDITED and row.get("losses"))
        self.log_points(
            (f"curves/{row['edit_id']}/{name}", value, step)
            for row in islice(edited, num_edits)
            for name, values in row["losses"].items()
            for step, value in enumerate(values)
        )

    def _log_table(self, workspace: Workspace) -> None:
        rows = list(islice(read_rows(parts(workspace), _TABLE_COLUMNS), _TABLE_ROWS))
        # In the format of MLflow's `log_table`, which cannot be used: it appends to the table of an earlier call.
        data = [[row.get(name) for name in _TABLE_COLUMNS] for row in rows]
        self.log_json({"columns": list(_TABLE_COLUMNS), "data": data}, "edits_table.json")

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
        run = Tracker.create(store, experiment, name, _tags(config, code) | dict(notes))
        run.log_values(flatten(config.to_dict()))
        run.log_curves(curves)
        run.finish("FINISHED")
    except Exception as error:
        raise TrackingError(
            f"MLflow at {masked(uri)} could not be written to ({in_words(error)}). The weights are complete: {out}."
        ) from error
    return uri


def _tags(config: RunConfig, code: str) -> dict[str, str]:
    return {
        "odedit.version": code,
        "odedit.editor": config.editor.name,
        "odedit.objective": config.objective.name,
        "odedit.backbone": config.backbone.name,
        "odedit.supervision": supervision_name(config),
    }
