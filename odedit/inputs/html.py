"""HTML of requests and pictures for notebooks. Every text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from odedit.inputs.batch import EditRequest, Picture, Probe

SIDE, QUALITY = 128, 55
"""Longest side in pixels, and WebP quality, of a thumbnail."""


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> str:
    """A picture as WebP in base64, scaled down to at most `side` pixels.

    Args:
        pixels: RGB `uint8 (height, width, 3)`.
    """
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=QUALITY, method=4)
    return base64.b64encode(stream.getvalue()).decode()


def picture_html(picture: Picture | None, what: str = "Picture") -> str:
    """An image, or its size if it is processed or has no pixels; empty without a picture."""
    if picture is None:
        return ""
    if picture.is_processed or not picture.pixels.size:
        return f"{escape(what)}: {escape(' x '.join(map(str, picture.pixels.shape)))}"
    source = f"data:image/webp;base64,{thumbnail(picture.pixels)}"
    return f'<img src="{source}" alt="{escape(what)}" style="max-width: 8rem">'


def table_html(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML already; heads are text."""
    head = "".join(f"<th scope='col' style='text-align: left'>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def request_html(request: EditRequest) -> str:
    """A request: its edit, its supervision and its probes, each with its picture."""
    probes: Mapping[str, Probe] = {"edit": request.edit, **request.supervision, **request.probes}
    rows = [
        (escape(name), picture_html(each.picture, f"Picture of {name}"), escape(each.prompt), escape(each.target))
        for name, each in probes.items()
    ]
    old = "" if request.replaced is None else f", instead of {request.replaced!r}"
    title = f"<strong>{escape(request.edit_id)}</strong> ({escape(request.task)}){escape(old)}"
    return title + table_html(("", "picture", "question", "answer"), rows)
