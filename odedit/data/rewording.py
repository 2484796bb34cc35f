"""Held-out rephrases of an edit: its question reworded by a template, its image augmented.

They replace the rephrases that the edit is scored on, which supervision must not use. Both are deterministic functions
of the edit id and the seed.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from odedit.data.fields import CAPTION_PROMPT
from odedit.inputs.batch import Picture

QUESTION_WORDINGS = (
    "Look at the picture and answer: {}",
    "Here is a question about the image. {}",
    "Based on what the image shows: {}",
    "Please tell me the following. {}",
    "Consider this image. {}",
    "{} Answer from the picture.",
    "{} Give a brief reply.",
)
CAPTION_WORDINGS = (
    "a picture of",
    "an image of",
    "a photograph of",
    "this picture shows",
    "this is a photo of",
    "the image depicts",
    "a snapshot of",
)
OTHER_CAPTION_WORDINGS = ("In this picture: {}", "Describing the image: {}", "Caption of the photo: {}")

MAX_ROTATION_DEGREES = 6.0
MIN_SCALE = 0.85
BRIGHTNESS = ((0.80, 0.92), (1.08, 1.20))
"""Ranges of the brightness factor; 1 is outside of both, so that the brightness always changes."""


def seeded(edit_id: str, purpose: str, seed: int = 0) -> random.Random:
    """A random generator seeded by the three values, the same in every process and Python version."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{edit_id}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def reword(prompt: str, task: str, rng: random.Random, scored: Collection[str] = ()) -> str:
    """The prompt in a random wording that keeps its meaning.

    Args:
        prompt: Prompt of the edit.
        task: `vqa` or `caption`; the caption prompt of MMEdit is replaced as a whole.
        rng: Generator that chooses the wording.
        scored: Prompts in lower case that are excluded, because the edit is scored on them.
    """
    if task == "caption" and prompt.strip() == CAPTION_PROMPT:
        wordings: tuple[str, ...] = CAPTION_WORDINGS
    else:
        wordings = OTHER_CAPTION_WORDINGS if task == "caption" else QUESTION_WORDINGS
    reworded = [wording.format(prompt) if "{}" in wording else wording for wording in wordings]
    allowed = [text for text in reworded if " ".join(text.casefold().split()) not in scored]
    return rng.choice(allowed or [prompt])


def replace_words(prompt: str, share: float, rng: random.Random, vocabulary: Sequence[str] = ()) -> str:
    """The prompt with a share of its words replaced by random ones.

    Args:
        prompt: Prompt, split into words at spaces.
        share: Share of words to replace, 0 to 1; the count is rounded.
        rng: Generator that chooses the positions and the new words.
        vocabulary: Words to draw from, without the prompt's own; if none are left, the words of the wordings above.
    """
    words = prompt.split()
    own = {word.casefold() for word in words}
    others = [word for word in vocabulary if word.casefold() not in own]
    others = others or [word for word in _OWN_WORDS if word.casefold() not in own]
    for position in sorted(rng.sample(range(len(words)), round(share * len(words)))):
        words[position] = rng.choice(others)
    return " ".join(words)


def words_of(texts: Collection[str]) -> list[str]:
    """Distinct words of some texts, sorted.

    >>> words_of(["a photo of", "of {}"])
    ['a', 'of', 'photo']
    """
    return sorted({word for text in texts for word in text.split() if word != "{}"})


_OWN_WORDS = words_of((*QUESTION_WORDINGS, *CAPTION_WORDINGS, *OTHER_CAPTION_WORDINGS))


def blend_noise(picture: Picture, share: float, rng: random.Random) -> Picture:
    """The picture blended with uniform noise: `(1 - share) * picture + share * noise`, rounded."""
    seed = rng.getrandbits(64)
    noise = np.random.default_rng(seed).integers(0, 256, picture.pixels.shape)
    mixed = np.rint((1 - share) * picture.pixels + share * noise).astype(np.uint8)
    return Picture(f"{picture.key}-noise-{share}-{seed:016x}", mixed)


def augment(picture: Picture, rng: random.Random) -> Picture:
    """The picture rotated by a few degrees, cropped, and made lighter or darker.

    No flip and no change of hue, since questions ask about sides and colours. The crop lies inside the rotated picture,
    so there is no border to fill.
    """
    seed = rng.getrandbits(64)
    rng = random.Random(seed)
    image = Image.fromarray(picture.pixels)
    image = image.transform(
        image.size, Image.Transform.AFFINE, _affine(image.size, rng), resample=Image.Resampling.BILINEAR
    )
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(*rng.choice(BRIGHTNESS)))
    return Picture(f"{picture.key}-{seed:016x}", np.array(image, dtype=np.uint8))


def _affine(size: tuple[int, int], rng: random.Random) -> tuple[float, ...]:
    """Affine coefficients in Pillow's order; they map output pixels to input pixels."""
    width, height = size
    limit = MAX_ROTATION_DEGREES * min(size) / max(size)  # rotating a long strip would crop most of it
    angle = math.radians(rng.uniform(-limit, limit))
    cos, sin = math.cos(angle), math.sin(angle)
    needed_width = width * cos + height * abs(sin)
    needed_height = width * abs(sin) + height * cos
    scale = rng.uniform(MIN_SCALE, 1.0) * min(width / needed_width, height / needed_height)
    center_x = width / 2 + rng.uniform(-1, 1) * (width - scale * needed_width) / 2
    center_y = height / 2 + rng.uniform(-1, 1) * (height - scale * needed_height) / 2
    a, b, d, e = scale * cos, -scale * sin, scale * sin, scale * cos
    return (a, b, center_x - a * width / 2 - b * height / 2, d, e, center_y - d * width / 2 - e * height / 2)
