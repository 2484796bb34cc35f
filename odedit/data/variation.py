"""Copies of a picture: the same thing at another angle, size, place and light, or something else made from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from odedit.data.rewording import seeded
from odedit.inputs.batch import Picture

MAX_ROTATION = 0.3
"""Largest rotation, in radians."""
SCALES = (0.85, 1.15)
"""Smallest and largest size relative to the picture's."""
MAX_SHIFT = 0.06
"""Largest shift, as a share of a side."""
LIGHT = (0.92, 1.08)
"""Smallest and largest factor of a colour channel."""
NOISE = 5.0
"""Standard deviation of the noise of a pixel, of 255."""
_MAX_OFF_MIDDLE = 0.15
"""Largest distance of the line between joined pictures from the middle, as a share of the width."""


def variations(picture: Picture, count: int, purpose: str, seed: int = 0) -> list[Picture]:
    """Varied copies of a picture as read, the same for the same arguments.

    Args:
        purpose: Text that, with the picture's key and the seed, determines the copies.
    """
    draw = np.random.default_rng(seeded(picture.key, purpose, seed).getrandbits(64))
    image = Image.fromarray(picture.pixels)
    return [Picture(f"{picture.key}-{purpose}-{seed}-{index}", _varied(image, draw)) for index in range(count)]


def altered(picture: Picture, others: Sequence[Picture], count: int, purpose: str, seed: int = 0) -> list[Picture]:
    """Varied copies that show something else: in turned hues, half of them mirrored, and joined with another picture.

    Every second copy is joined: on one side of a line near the middle it shows one of the `others`.

    Args:
        others: Pictures to join with; without any, no copy is joined.
        purpose: Text that, with the picture's key and the seed, determines the copies.
    """
    draw = np.random.default_rng(seeded(picture.key, purpose, seed).getrandbits(64))
    copies = []
    for index in range(count):
        pixels = _turned(Image.fromarray(picture.pixels), draw)
        if index % 2 and others:
            other = Image.fromarray(others[int(draw.integers(len(others)))].pixels)
            pixels = _joined(pixels, _turned(other.resize((pixels.shape[1], pixels.shape[0])), draw), draw)
        varied = _varied(Image.fromarray(np.ascontiguousarray(pixels)), draw)
        copies.append(Picture(f"{picture.key}-{purpose}-{seed}-{index}", varied))
    return copies


def _turned(image: Image.Image, draw: np.random.Generator) -> np.ndarray:
    """Pixels in hues turned by a random angle, mirrored or not."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(draw.integers(256))
    turned = Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")
    pixels = np.asarray(turned)
    return pixels[:, ::-1] if draw.random() < 0.5 else pixels


def _joined(first: np.ndarray, second: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The first picture on one side of a random line, the second on the other."""
    height, width = first.shape[:2]
    y, x = np.mgrid[:height, :width]
    angle = draw.uniform(0, 2 * math.pi)
    distance = math.cos(angle) * (x - width / 2) + math.sin(angle) * (y - height / 2)
    is_first = distance > draw.uniform(-_MAX_OFF_MIDDLE, _MAX_OFF_MIDDLE) * width
    return np.where(is_first[..., None], first, second)


def _varied(image: Image.Image, draw: np.random.Generator) -> np.ndarray:
    width, height = image.size
    angle, scale = draw.uniform(-MAX_ROTATION, MAX_ROTATION), 1 / draw.uniform(*SCALES)
    shift_x, shift_y = draw.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * (width, height)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    # Pillow's coefficients map a position of the copy to one of the picture; the centre stays, but for the shift.
    middle_x, middle_y = width / 2, height / 2
    offset_x = middle_x + shift_x - cos * middle_x + sin * middle_y
    offset_y = middle_y + shift_y - sin * middle_x - cos * middle_y
    # A border of the picture's own edge pixels: a border of one colour would tell copies from pictures.
    border = max(width, height) // 2
    padded = Image.fromarray(np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), mode="edge"))
    moved = padded.transform(
        image.size,
        Image.Transform.AFFINE,
        (cos, -sin, offset_x + border, sin, cos, offset_y + border),
        resample=Image.Resampling.BILINEAR,
    )
    pixels = np.asarray(moved, dtype=np.float32) * draw.uniform(*LIGHT, 3) + draw.normal(0, NOISE, (height, width, 3))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
