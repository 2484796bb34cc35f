"""Shared fixtures: the embedded model, loaded once, and requests over the embedded world or made up."""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from odedit import EditRequest, Picture, Probe, find_template, load_backbone
from odedit.backbones import Backbone, encode_requests
from odedit.edits import EditBatch

# Two cores are shared by everything that runs; tiny matrices gain nothing from more threads.
torch.set_num_threads(1)

TEMPLATE = find_template("mmedit")


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("blip2", "embedded")


def make_picture(number: int) -> Picture:
    pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Picture(f"picture-{number}", pixels)


def make_request(number: int, *, full: bool = True) -> EditRequest:
    """A request with every supervision slot, or only the edit with one rephrase and one locality probe."""
    target = ("anna hill", "leo stone", "ruby")[number % 3]
    question = ("who owns this digit?", "which food does this number like?")[number % 2]
    edit = Probe(question, target, make_picture(number))
    supervision = {
        "text_rephrase": Probe("tell me the owner of this number", target, make_picture(number)),
        "image_rephrase": Probe(question, target, make_picture(100 + number)),
        "text_locality": Probe("what is the capital of arland?", "rome"),
        "image_locality": Probe("which colour is it?", "red", make_picture(200 + number)),
        "near_locality": Probe(question, "bob", make_picture(300 + number)),
    }
    probes = {
        "t_gen": Probe("whose digit is this?", target, make_picture(number)),
        "m_gen": Probe(question, target, make_picture(400 + number)),
        "t_loc": Probe("which language do they speak in belland?", "belish"),
        "m_loc": Probe("which number is this?", "four", make_picture(500 + number)),
        "m_loc_near": Probe(question, "max moor", make_picture(600 + number)),
    }
    if not full:
        supervision = {name: supervision[name] for name in ("text_rephrase", "text_locality")}
        probes = {name: probes[name] for name in ("t_gen", "t_loc")}
    return EditRequest(f"edit-{number}", edit, supervision, probes)


@pytest.fixture(scope="session")
def requests_8() -> list[EditRequest]:
    """Eight requests of different lengths, one of them with few sequences."""
    return [make_request(number, full=number != 5) for number in range(8)]


@pytest.fixture(scope="session")
def batches(backbone: Backbone, requests_8: list[EditRequest]) -> tuple[EditBatch, EditBatch]:
    return encode_requests(backbone, requests_8, TEMPLATE)
