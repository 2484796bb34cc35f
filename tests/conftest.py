"""Shared fixtures: the embedded model, loaded once, and requests over the embedded world or made up."""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from made_up import TEMPLATE, make_request

from odedit import EditRequest, load_backbone
from odedit.backbones import Backbone, encode_requests
from odedit.edits import EditBatch

# Two cores are shared by everything that runs; tiny matrices gain nothing from more threads.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("blip2", "embedded")


@pytest.fixture(scope="session")
def requests_8() -> list[EditRequest]:
    """Eight requests of different lengths, one of them with few sequences."""
    return [make_request(number, full=number != 5) for number in range(8)]


@pytest.fixture(scope="session")
def batches(backbone: Backbone, requests_8: list[EditRequest]) -> tuple[EditBatch, EditBatch]:
    return encode_requests(backbone, requests_8, TEMPLATE)
