"""Held-out rephrases of an edit: its question reworded by a template, its image augmented.

They stand in for the scored rephrases, which supervision must not use. Both are deterministic functions
of the edit id and the seed.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

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
MIRRORED, BLURRED, ON_BACKGROUND = 0.5, 0.3, 0.3
"""Shares of the pictures that are mirrored (where the answer allows it), blurred, and put on a background."""
BLUR, SIZES = (0.004, 0.012), (0.75, 0.95)
_AUGMENTED = re.compile(r"((-noise-[0-9.e-]+)?-[0-9a-f]{16})+$")
_NOT_MIRRORED = frozenset((
    "left", "right", "side", "sides", "direction", "facing", "east", "west", "clockwise", "read", "reads", "text",
    "word", "words", "letter", "letters", "number", "numbers", "digit", "digits", "write", "written", "writing",
    "say", "says", "sign", "signs", "logo", "brand", "clock", "time", "label", "title", "plate", "caption",
))  # fmt: skip


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


def augment(picture: Picture, rng: random.Random, *, may_mirror: bool = False) -> Picture:
    """The picture under a random `Augmentation`."""
    return Augmentation.drawn(rng, may_mirror=may_mirror).of(picture)


@dataclass(frozen=True)
class Augmentation:
    """Changes of a picture that leave what it shows: always another angle, part and light; others for some pictures.

    No change of hue, since questions ask about colours. The part lies inside the turned picture, so that there is no
    border to fill.

    Attributes:
        number: Number of the draw, which names the new picture.
        turn: Angle as a share of the largest one, -1 to 1.
        part: Side of the part that is kept, relative to the picture.
        place: Place of the part, -1 to 1 across and down.
        light: Factor of the brightness.
        is_mirrored: True for left and right exchanged.
        blur: Standard deviation of a blur, relative to the shorter side; 0: none.
        size: Size on a background, the picture's own colours out of focus; 1: no background.
    """

    number: int
    turn: float
    part: float
    place: tuple[float, float]
    light: float
    is_mirrored: bool = False
    blur: float = 0.0
    size: float = 1.0

    @classmethod
    def drawn(cls, rng: random.Random, *, may_mirror: bool = False) -> Augmentation:
        """A random one.

        Args:
            may_mirror: Whether the answer stays right in a mirror, see `may_mirror`.
        """
        number = rng.getrandbits(64)
        rng = random.Random(number)
        turn, part = rng.uniform(-1, 1), rng.uniform(MIN_SCALE, 1.0)
        place = rng.uniform(-1, 1), rng.uniform(-1, 1)
        light = rng.uniform(*rng.choice(BRIGHTNESS))
        is_mirrored = rng.random() < MIRRORED and may_mirror
        blur = rng.uniform(*BLUR) if rng.random() < BLURRED else 0.0
        size = rng.uniform(*SIZES) if rng.random() < ON_BACKGROUND else 1.0
        return cls(number, turn, part, place, light, is_mirrored, blur, size)

    def of(self, picture: Picture) -> Picture:
        """The changed picture, of the same size."""
        image = Image.fromarray(picture.pixels)
        matrix = _affine(image.size, self.turn, self.part, self.place)
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)
        image = ImageEnhance.Brightness(image).enhance(self.light)
        if self.is_mirrored:
            image = ImageOps.mirror(image)
        if self.blur:
            image = image.filter(ImageFilter.GaussianBlur(self.blur * min(image.size)))
        if self.size < 1:
            image = self._on_background(image)
        return Picture(f"{picture.key}-{self.number:016x}", np.array(image, dtype=np.uint8))

    def _on_background(self, image: Image.Image) -> Image.Image:
        width, height = (max(1, round(self.size * side)) for side in image.size)
        background = image.filter(ImageFilter.GaussianBlur(min(image.size) / 4))
        left, top = (
            round((1 + place) / 2 * (whole - part))
            for place, whole, part in zip(self.place, image.size, (width, height), strict=True)
        )
        background.paste(image.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        return background

    def __str__(self) -> str:
        changes = [f"turned {self.turn * MAX_ROTATION_DEGREES:+.1f} degrees", f"cropped to {self.part:.2f}"]
        changes.append(f"{'lighter' if self.light > 1 else 'darker'} {self.light:.2f}")
        changes += ["mirrored"] if self.is_mirrored else []
        changes += [f"blurred {self.blur:.3f}"] if self.blur else []
        changes += [f"on a background {self.size:.2f}"] if self.size < 1 else []
        return ", ".join(changes)


def base_key(key: str) -> str:
    """Key of the picture that an augmented or a noisy one is made of; any other key as it is."""
    return _AUGMENTED.sub("", key)


def may_mirror(*texts: str) -> bool:
    """Whether the answer to a question stays right in a mirror: neither asks for sides, nor for what can be read.

    >>> may_mirror("what is this animal?", "a cat"), may_mirror("who stands on the left?", "Anna")
    (True, False)
    """
    words = set(re.findall(r"[a-z]+|[0-9]", " ".join(texts).casefold()))
    return words.isdisjoint(_NOT_MIRRORED) and not any(word.isdigit() for word in words)


def _affine(size: tuple[int, int], turn: float, part: float, place: tuple[float, float]) -> tuple[float, ...]:
    """Affine coefficients in Pillow's order; they map output pixels to input pixels."""
    width, height = size
    limit = MAX_ROTATION_DEGREES * min(size) / max(size)  # rotating a long strip would crop most of it
    angle = math.radians(turn * limit)
    cos, sin = math.cos(angle), math.sin(angle)
    needed_width = width * cos + height * abs(sin)
    needed_height = width * abs(sin) + height * cos
    scale = part * min(width / needed_width, height / needed_height)
    center_x = width / 2 + place[0] * (width - scale * needed_width) / 2
    center_y = height / 2 + place[1] * (height - scale * needed_height) / 2
    a, b, d, e = scale * cos, -scale * sin, scale * sin, scale * cos
    return (a, b, center_x - a * width / 2 - b * height / 2, d, e, center_y - d * width / 2 - e * height / 2)
