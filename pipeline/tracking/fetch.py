"""Downloads edits and results of earlier runs from MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from odedit.errors import InputError, in_words, listed
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, locate
from pipeline.tracking.client import PARENT_TAG, Store
from pipeline.tracking.connection import database_file

_RESULTS, _CONFIG = "results", "config.yaml"


def fetch_edit(uri: str, run_id: str, edit_id: str, folder: Path) -> Path:
    """Downloads an edit that a run logged; returns the file.

    Raises:
        InputError: There is no such store, run or edit.
    """
    failure = f"edit {edit_id!r} of run {run_id!r} cannot be fetched:"
    _check_database(uri, failure)
    store = Store.open(uri)
    try:
        return store.download(run_id, f"edits/{edit_id}.safetensors", folder)
    except Exception as error:
        reason = _logged_edits(store, run_id) if store.has_run(run_id) else in_words(error)
        raise InputError(f"{failure} {reason}") from error


def fetch_results(uri: str, run_id: str, folder: Path) -> list[tuple[str, Location]]:
    """Downloads settings and rows of a run, or of the runs of a study or search; returns names and folders.

    Raises:
        InputError: There is no such store or run, or no record was edited in it.
    """
    _check_database(uri, "--uri:")
    store = Store.open(uri)
    if not store.has_run(run_id):
        raise InputError(f"RUN: {masked(uri)} has no run {run_id!r}.")
    run = store.run(run_id)
    results = []
    for candidate in [run, *store.search(run.info.experiment_id, _children(run))]:
        candidate_id = candidate.info.run_id
        if {_RESULTS, _CONFIG} <= set(store.artifacts(candidate_id)):
            target = folder / candidate_id
            target.mkdir(parents=True, exist_ok=True)
            for name in (_RESULTS, _CONFIG):
                store.download(candidate_id, name, target)
            results.append((candidate.info.run_name, locate(str(target), "RUN")))
    if not results:
        raise InputError(f"RUN: the run {run_id!r} holds no results of edits; a trial of a search has none of its own.")
    return results


def _children(run: Any) -> str:
    """MLflow query for the runs of a study or search that edited records."""
    search = run.data.tags.get("odedit.search")
    if search is None:
        return f"tags.`{PARENT_TAG}` = '{run.info.run_id}'"
    return f"tags.`odedit.search` = '{search}' and tags.`odedit.kind` = 'evaluation'"


def _check_database(uri: str, failure: str) -> None:
    """Raises InputError if the store is a missing database file, which opening would create."""
    database = database_file(uri)
    if database is not None and not database.is_file():
        raise InputError(f"{failure} there is no database {database}.")


def _logged_edits(store: Store, run_id: str) -> str:
    """A sentence that lists the edits of a run."""
    names = sorted(Path(path).stem for path in store.artifacts(run_id, "edits"))
    if not names:
        return "the run has logged no edits (tracking.edits_gib bounds how many are)."
    return f"the run has {listed(names)}."
