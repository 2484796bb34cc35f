"""Shared fixtures: the embedded model, loaded once, and requests over the embedded world or made up."""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from odedit import EditRequest, load_backbone, world
from odedit.backbones import Backbone, encode_requests
from odedit.inputs.batch import EditBatch
from odedit.storage import disk_cache
from pipeline.run_folder.sources import embedded_name
from tests.support.requests import TEMPLATE, make_request

if TYPE_CHECKING:
    from tests.support.object_store import ObjectStore

# Two cores are shared by everything that runs; tiny matrices gain nothing from more threads.
torch.set_num_threads(1)


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
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Path]]:
    """The embedded benchmark of seeds 0 and 1, as `world.build` names its files, beside each other. Not to be changed.

    Writing one takes ten seconds.
    """
    parent = tmp_path_factory.mktemp("worlds")
    return {seed: world.build(parent / embedded_name(seed), seed) for seed in (0, 1)}


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
