"""Brings the results of earlier runs back from MLflow."""

from __future__ import annotations

from pathlib import Path

from odedit.errors import InputError
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, locate
from pipeline.tracking.runs import PARENT_TAG, _client, _exists


def fetch_results(uri: str, run_id: str, folder: Path) -> list[tuple[str, Location]]:
    """Downloads a run's settings and rows, or those of the runs of a study or search; returns names and folders.

    Raises:
        InputError: There is no such store or run, or nothing that was edited in it.
    """
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():  # opening it would create it
        raise InputError(f"--uri: there is no database {database}.")
    client = _client(uri)
    if not _exists(client, run_id):
        raise InputError(f"RUN: {masked(uri)} has no run {run_id!r}.")
    run = client.get_run(run_id)
    experiments = [run.info.experiment_id]
    queries = [f"tags.`{PARENT_TAG}` = '{run_id}'"]
    if "odedit.search" in run.data.tags:
        search = run.data.tags["odedit.search"]
        queries = [f"tags.`odedit.search` = '{search}' and tags.`odedit.kind` = 'evaluation'"]
    children = [child for query in queries for child in client.search_runs(experiments, query, max_results=1000)]
    found = []
    for one in [run, *sorted(children, key=lambda child: child.info.start_time)]:
        names = {item.path for item in client.list_artifacts(one.info.run_id)}
        if {"results", "config.yaml"} <= names:
            target = folder / one.info.run_id
            target.mkdir(parents=True, exist_ok=True)
            for name in ("results", "config.yaml"):
                client.download_artifacts(one.info.run_id, name, str(target))
            found.append((one.info.run_name, locate(str(target), "RUN")))
    if not found:
        raise InputError(f"RUN: the run {run_id!r} holds no results of edits; a trial of a search has none of its own.")
    return found
