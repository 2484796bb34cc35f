"""Requests with random pictures, for tests that need shapes and no meaning."""

from __future__ import annotations

import numpy as np

from odedit import EditRequest, Picture, Probe, find_template
from odedit.backbones import is_connector
from odedit.data.negatives import NegativePool

TEMPLATE = find_template("mmedit")


def make_picture(number: int) -> Picture:
    pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Picture(f"picture-{number}", pixels)


def make_pool(backbone, count: int = 4, sites: tuple[str, ...] = ()) -> NegativePool:
    """A pool of pictures of no request; each edit gets `count` of them."""
    before = any(map(is_connector, sites))
    return NegativePool(backbone.image_features([make_picture(number) for number in range(700, 712)], before), count)


def make_request(number: int, *, full: bool = True) -> EditRequest:
    """A request with all supervision slots, or with one rephrase and one locality probe only."""
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
