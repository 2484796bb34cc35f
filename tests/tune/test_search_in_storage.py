"""A search whose folder is in an object store, with its own Ray."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from odedit import InputError
from pipeline.workers import ray_session
from tests.support.object_store import ObjectStore
from tune.config import from_values
from tune.folder import Folder
from tune.run import run

OUT = "s3://odedit/searches/one"


@pytest.mark.ray
def test_a_search_goes_to_the_store_and_goes_on_there(
    values: dict[str, Any], bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["settings"]["tracking"] = {"enabled": False}
    with pytest.raises(InputError, match=f"^storage: has to be given where a search is kept at an address .{OUT}."):
        run(from_values(values), OUT, Console(quiet=True))
    assert bucket.names() == []

    values |= {"storage": f"sqlite:///{tmp_path / 'optuna.db'}", "trials": 2}
    with ray_session.shared():
        _search_and_go_on(values, bucket)


def _search_and_go_on(values: dict[str, Any], bucket: ObjectStore) -> None:
    found = run(from_values(values), OUT, Console(quiet=True))
    names = Folder.of(OUT).out.names()
    assert {"best.yaml", "evaluation", "search.json", "search.yaml", "summary.json", "trials", "trials.csv"} <= set(
        names
    )
    assert not [name for name in bucket.names("searches/one/") if "/.tune-" in name]
    tried = [name for name in bucket.names("searches/one/trials/") if "/results/" in name]
    assert len({name.split("/")[3] for name in tried}) == 2

    # Additional trials are run, and none twice.
    before, stream = len(bucket.requests), io.StringIO()
    values["trials"] = 3
    more = run(from_values(values), OUT, Console(file=stream, width=300), resume=True)
    written = {request.removeprefix("PUT /odedit/") for request in bucket.requests[before:] if "PUT" in request}
    assert not written & set(tried) and len({name for name in written if "/rung-" in name}) >= 1
    assert "2 of 3 trials done" in stream.getvalue() and more.best.number in (0, 1, 2)
    assert found.best.number in (0, 1)
