"""Copies of a picture: the same thing at another angle, size, place and light, or in other colours too."""

from __future__ import annotations

import math

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


def variations(picture: Picture, count: int, purpose: str, seed: int = 0) -> list[Picture]:
    """Varied copies of a picture as read, the same for the same arguments.

    Args:
        purpose: Text that, with the picture's key and the seed, determines the copies.
    """
    draw = np.random.default_rng(seeded(picture.key, purpose, seed).getrandbits(64))
    image = Image.fromarray(picture.pixels)
    return [Picture(f"{picture.key}-{purpose}-{seed}-{index}", _varied(image, draw)) for index in range(count)]


def recoloured(picture: Picture, count: int, purpose: str, seed: int = 0) -> list[Picture]:
    """Varied copies whose hues are turned by a random angle: pictures of things that look otherwise.

    Args:
        purpose: As for `variations`.
    """
    draw = np.random.default_rng(seeded(picture.key, purpose, seed).getrandbits(64))
    hue, saturation, value = Image.fromarray(picture.pixels).convert("HSV").split()
    copies = []
    for index in range(count):
        shift = int(draw.integers(256))
        turned = Image.merge("HSV", (hue.point(lambda h, by=shift: (h + by) % 256), saturation, value)).convert("RGB")
        copies.append(Picture(f"{picture.key}-{purpose}-{seed}-{index}", _varied(turned, draw)))
    return copies


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
