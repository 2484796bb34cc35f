"""The MLflow run of a study, the parent of its arms' runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from odedit.errors import in_words
from odedit.storage.location import Location
from pipeline.config.values import masked_values
from pipeline.tracking import origin
from pipeline.tracking.client import Store, Table, Tracker, TrackingError


class StudyRun(Tracker):
    """A study's run: its specification, tables and plot."""

    @classmethod
    def start(
        cls, uri: str, experiment: str, name: str, study: Mapping[str, Any], run_id: str | None, code: str
    ) -> Self:
        """Continues the run of that id, or creates one that holds the study's specification.

        Args:
            experiment: Name of the experiment.
            study: Specification, logged as `study.json`.
            code: Version of the code that runs the study.

        Raises:
            InputError: The store cannot be reached.
        """
        store = Store.open(uri)
        if (resumed := cls.resume(store, run_id)) is not None:
            return resumed
        tags = origin.tags("study") | {"odedit.version": code, "odedit.study": name}
        with cls.created(store, store.experiment(experiment), name, tags) as run:
            run.log_json(masked_values(study), "study.json")
        return run

    def log_study(self, files: Sequence[Location], table: Table, markdown: str) -> None:
        """Logs the study's files, its table and its description; the metrics are those of its arms' runs.

        Raises:
            TrackingError: The store refused; calling again is safe.
        """
        try:
            self.describe(markdown)
            self.log_tables({"study_table.json": table})
            for file in files:
                self.log_file(file)
        except Exception as error:
            raise TrackingError(f"MLflow could not be written to ({in_words(error)}).") from error
