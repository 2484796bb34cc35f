"""Logging of a finished run to MLflow, at its end or later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from odedit.data.images import ImageReader
from pipeline.config.run import RunConfig
from pipeline.driver.preflight import update
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking import models
from pipeline.tracking.logged import with_entry
from pipeline.tracking.runs import EditRun


def log(
    tracker: EditRun,
    config: RunConfig,
    workspace: Workspace,
    summary: Mapping[str, Any],
    reader: ImageReader | None = None,
) -> None:
    """Logs results and, if there is one, the committed model.

    Args:
        reader: Reader of the records' pictures; None: that of the configuration.

    Raises:
        TrackingError: The store refused; calling again is safe.
    """
    from pipeline.report.overview import overview

    seen = overview(workspace, config, summary, reader)
    tracker.log_results(config, workspace, summary, seen)
    if models.is_committed(workspace):
        models.log_committed(tracker, config, workspace, summary, seen.description)
    update(workspace, logged=with_entry(config, workspace, tracker.run_id))


def command(config: RunConfig, *, is_scored: bool) -> str:
    """Command that makes the run.

    Args:
        is_scored: Whether its records are scored on a whole model.
    """
    if config.commit is not None:
        return "commit"
    return "score" if is_scored else "edit"
