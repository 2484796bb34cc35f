"""Shared fixtures: the embedded model, loaded once, and requests over the embedded world or made up."""

from __future__ import annotations

import os
import pickle

# Processes that tests start keep the byte code of this project: compiling it takes half a second each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock

from odedit import EditRequest, load_backbone, world
from odedit.backbones import Backbone, encode_requests
from odedit.inputs.batch import EditBatch
from odedit.storage import disk_cache
from pipeline.run_folder.sources import embedded_name
from tests.support import schedule
from tests.support.requests import TEMPLATE, make_request

if TYPE_CHECKING:
    from tests.support.object_store import ObjectStore

# Two cores are shared by everything that runs; tiny matrices gain nothing from more threads.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    schedule.mark_slow(items)
    if config.pluginmanager.has_plugin("dsession") or hasattr(config, "workerinput"):
        schedule.distribute(items)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same in all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Notes of this process go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("notes") / "own"
        patch.setattr(disk_cache, "folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("blip2", "embedded")


@pytest.fixture(scope="session")
def worlds(shared_folder: Path) -> dict[int, dict[str, Path]]:
    """Files of the embedded benchmark for seeds 0 and 1, as `world.build` names them. Read only.

    Writing takes ten seconds a seed, so one process of pytest-xdist does it for all.
    """
    made = shared_folder / "worlds.pickle"
    with FileLock(shared_folder / "worlds.lock"):
        if not made.exists():
            parent = shared_folder / "worlds"
            built = {seed: world.build(parent / embedded_name(seed), seed) for seed in (0, 1)}
            made.write_bytes(pickle.dumps(built))
        return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def requests_8() -> list[EditRequest]:
    """Eight requests of different lengths, one of them with few sequences."""
    return [make_request(number, full=number != 5) for number in range(8)]


@pytest.fixture(scope="session")
def batches(backbone: Backbone, requests_8: list[EditRequest]) -> tuple[EditBatch, EditBatch]:
    return encode_requests(backbone, requests_8, TEMPLATE)


@pytest.fixture
def bucket() -> Iterator[ObjectStore]:
    """A server of objects with an empty bucket, which the environment names: `s3://odedit/...`."""
    from tests.support.object_store import object_store  # takes a second to import

    with object_store() as store:
        yield store
