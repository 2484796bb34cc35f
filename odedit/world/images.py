"""Pictures of the embedded world: coloured handwritten digits on a background, 32 x 32 pixels.

The handwriting is scikit-learn's copy of the UCI optical digits (1,797 samples by 43 writers, 8 x 8). A quarter of the
samples is held out from training and divided between the splits of the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from odedit.runtime.brief import brief
from odedit.world.facts import DIGITS, WORLD, Entity

SIZE = 32
_COLOUR_RGB = np.array(
    [[215, 30, 35], [25, 165, 55], [35, 65, 230], [240, 215, 25], [250, 105, 195], [20, 215, 225]], np.float32
)
_BACKGROUND_RGB = np.array([[15, 15, 15], [250, 250, 250], [120, 120, 120], [105, 60, 25]], np.float32)
_HANDWRITING_SEED = 7 + WORLD  # every world holds out other samples
PARTS = ("train", "validation", "evaluation")
"""Splits of the benchmark; each has its own share of the held-out handwriting."""


@dataclass(frozen=True)
class Pose:
    """Ranges of the random distortions of a drawing, uniform in each range.

    Attributes:
        rotation: Absolute angle in radians; the sign is random.
        scale: Size of the glyph; 1 fills the picture.
        shift: Largest displacement, as a share of the picture, in each direction.
        shear: Largest shear factor.
        elastic: Standard deviation of the smooth displacement field, as a share of the picture.
        noise: Standard deviation of the pixel noise, of 255.
    """

    rotation: tuple[float, float]
    scale: tuple[float, float]
    shift: float
    shear: float
    elastic: float
    noise: float

    def eased(self, share: float) -> Pose:
        """The pose with its distortions multiplied by `share`, 0 to 1."""
        middle = sum(self.scale) / 2.0
        low, high = (middle + (bound - middle) * share for bound in self.scale)
        return replace(
            self,
            rotation=(self.rotation[0] * share, self.rotation[1] * share),
            scale=(low, high),
            shift=self.shift * share,
            shear=self.shear * share,
            elastic=self.elastic * share,
        )


TRAINING_POSE = Pose(rotation=(0.0, 0.3), scale=(0.73, 0.99), shift=0.1, shear=0.1, elastic=0.02, noise=6.0)
PLAIN_POSE = Pose(rotation=(0.0, 0.1), scale=(0.85, 0.97), shift=0.03, shear=0.03, elastic=0.01, noise=4.0)
REPHRASE_POSE = Pose(rotation=(0.12, 0.28), scale=(0.75, 0.97), shift=0.05, shear=0.05, elastic=0.01, noise=4.0)


@dataclass(frozen=True)
class Handwriting:
    """Handwritten samples and their split.

    Attributes:
        masks: Smooth masks, `float32 (samples, 32, 32)` in [0, 1].
        training: Training samples' indices, per digit.
        held_out: Held-out samples' indices, per digit, by split.
    """

    masks: np.ndarray
    training: tuple[np.ndarray, ...]
    held_out: dict[str, tuple[np.ndarray, ...]]

    __repr__ = brief


@lru_cache(maxsize=1)
def handwriting() -> Handwriting:
    """Loads and splits scikit-learn's digits; cached."""
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    digits = load_digits()
    masks = zoom(digits.images.astype(np.float32) / 16.0, (1, SIZE / 8, SIZE / 8), order=3, mode="nearest")
    rng = np.random.default_rng(_HANDWRITING_SEED)
    training, shares = [], []
    for digit in range(len(DIGITS)):
        samples = rng.permutation(np.flatnonzero(digits.target == digit))
        num_held_out = len(samples) // 4
        training.append(np.sort(samples[num_held_out:]))
        shares.append(np.array_split(samples[:num_held_out], 5))
    held_out = {
        part: tuple(np.sort(np.concatenate([share[i] for i in fifths])) for share in shares)
        for part, fifths in zip(PARTS, ((0, 1), (2,), (3, 4)), strict=True)
    }
    return Handwriting(np.clip(masks, 0.0, 1.0).astype(np.float32), tuple(training), held_out)


def render(
    rng: np.random.Generator, samples: np.ndarray, colours: np.ndarray, backgrounds: np.ndarray, pose: Pose
) -> np.ndarray:
    """Draws a batch of pictures.

    Args:
        rng: Generator of poses and noise.
        samples: Indices of handwriting samples, `int (N,)`.
        colours: Indices into `COLOURS`, `int (N,)`.
        backgrounds: Indices into `BACKGROUNDS`, `int (N,)`.
        pose: Ranges of the distortions.

    Returns:
        `uint8 (N, 32, 32, 3)`, RGB.
    """
    rows, columns = _source_coordinates(rng, len(samples), pose)
    mask = _bilinear(handwriting().masks[samples], rows, columns)
    mask = np.clip(mask * rng.uniform(1.0, 1.3, (len(samples), 1, 1)), 0.0, 1.0)[..., None]
    jitter = rng.normal(0.0, 6.0, (2, len(samples), 1, 1, 3))
    ink = _COLOUR_RGB[colours][:, None, None] + jitter[0]
    paper = _BACKGROUND_RGB[backgrounds][:, None, None] + jitter[1]
    picture = paper * (1.0 - mask) + ink * mask + rng.normal(0.0, pose.noise, (len(samples), SIZE, SIZE, 3))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def draw(rng: np.random.Generator, entity: Entity, sample: int, background: int, pose: Pose) -> np.ndarray:
    """One picture of an entity, `uint8 (32, 32, 3)`."""
    return render(rng, np.array([sample]), np.array([entity.colour]), np.array([background]), pose)[0]


def _source_coordinates(rng: np.random.Generator, count: int, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Glyph coordinates that each pixel samples: rows and columns, each `(N, 32, 32)`, in pixels."""
    angle = rng.uniform(*pose.rotation, count) * rng.choice([-1.0, 1.0], count)
    scale = rng.uniform(*pose.scale, count)
    shear = rng.uniform(-pose.shear, pose.shear, count)
    shift = rng.uniform(-pose.shift, pose.shift, (2, count))
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    axis = np.linspace(-0.5, 0.5, SIZE)
    y = axis[None, :, None] - shift[0][:, None, None]
    x = axis[None, None, :] - shift[1][:, None, None]
    x = x + shear[:, None, None] * y
    bend = _smooth_field(rng, count) * pose.elastic
    rows = cos[:, None, None] * y - sin[:, None, None] * x + bend[0]
    columns = sin[:, None, None] * y + cos[:, None, None] * x + bend[1]
    return (rows + 0.5) * (SIZE - 1), (columns + 0.5) * (SIZE - 1)


def _smooth_field(rng: np.random.Generator, count: int) -> np.ndarray:
    """A displacement of unit variance on a 4 x 4 grid, interpolated to `(2, N, 32, 32)`."""
    knots = rng.normal(0.0, 1.0, (2, count, 4, 4))
    position = np.linspace(0.0, 3.0, SIZE)
    low = np.minimum(position.astype(int), 2)
    weights = np.zeros((SIZE, 4))
    weights[np.arange(SIZE), low] = 1.0 - (position - low)
    weights[np.arange(SIZE), low + 1] = position - low
    return weights @ knots @ weights.T


def _bilinear(masks: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Samples `masks (N, 32, 32)` at fractional coordinates, with zeros outside."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    rows = np.clip(rows + 1.0, 0.0, SIZE + 0.999)
    columns = np.clip(columns + 1.0, 0.0, SIZE + 0.999)
    top, left = rows.astype(int), columns.astype(int)
    down, right = rows - top, columns - left
    n = np.arange(len(masks))[:, None, None]
    upper = padded[n, top, left] * (1.0 - right) + padded[n, top, left + 1] * right
    lower = padded[n, top + 1, left] * (1.0 - right) + padded[n, top + 1, left + 1] * right
    return upper * (1.0 - down) + lower * down
