"""Small files of records and folders of images in MMEdit's format."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (24, 18), mode: str = "RGB") -> Image.Image:
    """A picture of noise; each seed gives another one."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def record(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A record with its own question, images and answers; a change of None leaves the field out."""
    fields = {
        "src": f"What is object {number}?",
        "pred": f"cat {number}",
        "alt": f"dog {number}",
        "rephrase": f"Which thing is object {number}?",
        "image": f"val2014/COCO_val2014_{number:012d}.jpg",
        "image_rephrase": f"val2014_image_rephrase/{number}.png",
        "loc": f"who wrote book {number}",
        "loc_ans": f"Author {number}",
        "m_loc": f"val2014/COCO_val2014_{900000 + number:012d}.jpg",
        "m_loc_q": f"What colour is car {number}?",
        "m_loc_a": "red",
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def caption(number: int = 0, **changes: Any) -> dict[str, Any]:
    return record(number, **({"src": "a photo of", "rephrase": "a picture of"} | changes))


def write_array(path: Path, records: Sequence[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def write_images(folder: Path, records: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Writes every image that the records' standard fields name; returns the image root and the rephrase root."""
    image_root, rephrase_root = folder / "coco", folder / "rephrased"
    for number, fields in enumerate(records):
        named = [
            (image_root, fields["image"], 3 * number),
            (image_root, fields["m_loc"], 3 * number + 1),
            (rephrase_root, fields["image_rephrase"], 3 * number + 2),
        ]
        for root, name, seed in named:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(seed), "JPEG" if name.endswith("jpg") else "PNG"))
    return image_root, rephrase_root
