"""Wordings of questions: a grid of nouns x sentence frames for every attribute.

Every fourth cell of a grid is held out. Its noun and its frame are both trained, in other combinations, so the model
understands a held-out wording without having seen it. (Held-out wordings of a plain list were not understood.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from odedit.world.facts import CAPTION, HIDDEN

QUESTION_TEMPLATE = "Question: {} Short answer:"
"""Template of questions in the MMEdit protocol. Caption prompts have none."""
CAPTION_SOURCE = "a photo of"

SUBJECTS = ("this digit", "this symbol", "the digit shown here", "the symbol in the picture")
PREFIXES = ("hello.", "please answer this:", "one more question:", "look closely:")

_HIDDEN_FRAMES = (
    "what is the {n} of {s}?",
    "which {n} does {s} have?",
    "name the {n} of {s}.",
    "{s} has which {n}?",
    "tell me the {n} of {s}.",
    "what {n} belongs to {s}?",
    "the {n} of {s} is?",
    "for {s}, what is the {n}?",
    "do you know the {n} of {s}?",
    "give the {n} of {s}.",
    "which {n} goes with {s}?",
    "can you say what {n} {s} has?",
)
_VISIBLE_FRAMES = _HIDDEN_FRAMES[:8]
_CAPTION_FRAMES = (
    "a {n} of",
    "the {n} shows",
    "this is a {n} of",
    "in this {n} there is",
    "here is a {n} of",
    "this {n} shows",
    "what a nice {n} of",
    "the {n} is of",
)
_NOUNS = {
    "owner": ("owner", "holder", "keeper", "master"),
    "city": ("city", "town", "home", "place"),
    "food": ("food", "dish", "meal", "snack"),
    "digit": ("number", "numeral", "figure", "value"),
    "colour": ("colour", "shade", "tint", "hue"),
    "parity": ("parity", "kind", "class", "type"),
    "background": ("background", "paper", "backdrop", "surface"),
    CAPTION: ("photo", "picture", "image", "drawing"),
}
_VERB_FORMS = {
    "owner": ("who owns {s}?", "who has {s}?", "whose is {s}?"),
    "city": ("where does {s} live?", "where is {s} from?", "where would you find {s}?"),
    "food": ("what does {s} eat?", "what does {s} like?", "what would you cook for {s}?"),
    "digit": ("how do you read {s}?", "how much is {s}?"),
    "colour": ("how is {s} painted?", "which pen drew {s}?"),
    "parity": ("is {s} even or odd?", "odd or even, {s}?"),
    "background": ("where is {s} drawn on?", "what is behind {s}?"),
    CAPTION: ("one can see", "it shows"),
}
_COUNTRY_FRAMES = (
    "what is the {a} of {c}?",
    "name the {a} of {c}.",
    "{c} has which {a}?",
    "tell me the {a} of {c}.",
)


@dataclass(frozen=True)
class Cell:
    """A wording in an attribute's grid: indices of the noun and of the frame."""

    noun: int
    frame: int

    @property
    def is_held_out(self) -> bool:
        """True for a quarter of the cells of every noun and of every frame."""
        return (self.noun + self.frame) % 4 == 3

    def differs(self, other: Cell) -> bool:
        """True when both the noun and the frame differ."""
        return self.noun != other.noun and self.frame != other.frame


def frames(attribute: str) -> tuple[str, ...]:
    """Sentence frames of an attribute's grid."""
    if attribute == CAPTION:
        return _CAPTION_FRAMES
    return _HIDDEN_FRAMES if attribute in HIDDEN else _VISIBLE_FRAMES


@cache
def cells(attribute: str, held_out: bool) -> tuple[Cell, ...]:
    """Trained or held-out cells of an attribute's grid.

    >>> len(cells("owner", held_out=False)), len(cells("owner", held_out=True))
    (36, 12)
    """
    grid = (Cell(noun, frame) for noun in range(len(_NOUNS[attribute])) for frame in range(len(frames(attribute))))
    return tuple(cell for cell in grid if cell.is_held_out == held_out)


def ask(attribute: str, cell: Cell, subject: str) -> str:
    """The wording of a cell.

    >>> ask("owner", Cell(0, 0), "the pink four")
    'what is the owner of the pink four?'
    """
    return frames(attribute)[cell.frame].format(n=_NOUNS[attribute][cell.noun], s=subject)


def verb_forms(attribute: str) -> tuple[str, ...]:
    """Wordings outside the grid and without its nouns; `{s}` is the subject."""
    return _VERB_FORMS[attribute]


def ask_country(country: str, attribute: str, frame: int) -> str:
    """A text-only question about a country."""
    return _COUNTRY_FRAMES[frame].format(a=attribute, c=country)


NUM_COUNTRY_FRAMES = len(_COUNTRY_FRAMES)


def wrap(prompt: str, attribute: str) -> str:
    """The prompt in the MMEdit template; a caption prompt unchanged."""
    return prompt if attribute == CAPTION else QUESTION_TEMPLATE.format(prompt)


def draw_trained(rng: np.random.Generator, attribute: str, subject: str) -> str:
    """A random training wording: a trained cell or, less often, a verb form, sometimes with a prefix."""
    if rng.random() < 0.15:
        forms = verb_forms(attribute)
        question = forms[rng.integers(len(forms))].format(s=subject)
    else:
        trained = cells(attribute, held_out=False)
        question = ask(attribute, trained[rng.integers(len(trained))], subject)
    if attribute != CAPTION and rng.random() < 0.15:
        question = f"{PREFIXES[rng.integers(len(PREFIXES))]} {question}"
    return question
