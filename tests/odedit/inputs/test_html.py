"""Requests, results and pictures in a notebook, and in print."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from odedit.editing.curves import EditResult
from odedit.inputs.batch import EditRequest, Picture, Probe
from odedit.inputs.html import thumbnail

PIXELS = np.full((300, 400, 3), 200, dtype=np.uint8)


def test_a_request_shows_its_questions_and_pictures_as_text_and_thumbnails() -> None:
    edit = Probe("<b>who</b>?", "Anna", Picture("k", PIXELS))
    request = EditRequest("first", edit, probes={"t_loc": Probe("capital?", "Rome")}, replaced="Boris")
    html = request._repr_html_()
    assert "&lt;b&gt;who&lt;/b&gt;?" in html and "<b>" not in html
    assert html.count("<img") == 1 and 'alt="Picture of edit"' in html and "instead of &#x27;Boris&#x27;" in html
    assert len(repr(request)) < 1000 and "array(300, 400, 3)" in repr(request)


def test_a_thumbnail_is_small_and_of_the_same_shape() -> None:
    picture = Image.open(io.BytesIO(base64.b64decode(thumbnail(PIXELS, 64))))
    assert (picture.format, picture.size) == ("WEBP", (64, 48))


def test_pictures_without_pixels_show_their_size() -> None:
    processed = Picture("k", np.zeros((3, 8, 8), dtype=np.float32))
    assert processed._repr_html_() == "Picture k: 3 x 8 x 8"
    assert Picture.without_pixels("k")._repr_html_() == "Picture k: 0 x 0 x 3"


def test_a_result_shows_its_curves_and_shapes_without_tensors() -> None:
    curves = {"rel": [3.0, 1.0], "penalty": [0.0, 0.0]}
    result = EditResult("first", {"w": torch.zeros(1, 512, 512)}, 20, "converged", 0.5, curves)
    html = result._repr_html_()
    assert "converged after 20 steps, 0.5 s" in html and "(1, 512, 512)" in html and "tensor(" not in html
    assert "<td>rel</td><td>3</td><td>1</td>" in html and "penalty" not in html
    failed = EditResult("second", {}, 0, "failed", 0.0, error="<oops>")
    assert "&lt;oops&gt;" in failed._repr_html_()
