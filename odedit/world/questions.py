"""How the embedded world is asked: a grid of nouns x sentence frames for every attribute.

Every fourth cell of a grid is never trained. A held-out cell is therefore a wording that the model has
not seen, made of a noun and a frame that it has: it reads it well, and an edit was not made with it.
With a list of fixed wordings instead of a grid, held-out wordings were simply not understood.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from odedit.world.facts import CAPTION, HIDDEN

QUESTION_TEMPLATE = "Question: {} Short answer:"
"""The wrapper of questions in the MMEdit protocol. Captions are continued as they are."""
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
    """One wording of the grid of an attribute: indices of the noun and of the frame."""

    noun: int
    frame: int

    @property
    def is_held_out(self) -> bool:
        """Never trained: every noun and every frame loses a quarter of its cells."""
        return (self.noun + self.frame) % 4 == 3

    def differs(self, other: Cell) -> bool:
        """Whether both the noun and the frame are others."""
        return self.noun != other.noun and self.frame != other.frame


def frames(attribute: str) -> tuple[str, ...]:
    """The sentence frames of an attribute's grid."""
    if attribute == CAPTION:
        return _CAPTION_FRAMES
    return _HIDDEN_FRAMES if attribute in HIDDEN else _VISIBLE_FRAMES


@cache
def cells(attribute: str, held_out: bool) -> tuple[Cell, ...]:
    """The trained or the held-out cells of an attribute's grid.

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
    """Wordings outside the grid, with `{s}` for the subject; they share no noun with it."""
    return _VERB_FORMS[attribute]


def ask_country(country: str, attribute: str, frame: int) -> str:
    """A text-only question about a country."""
    return _COUNTRY_FRAMES[frame].format(a=attribute, c=country)


NUM_COUNTRY_FRAMES = len(_COUNTRY_FRAMES)


def wrap(prompt: str, attribute: str) -> str:
    """The prompt as the model reads it."""
    return prompt if attribute == CAPTION else QUESTION_TEMPLATE.format(prompt)


def draw_trained(rng: np.random.Generator, attribute: str, subject: str) -> str:
    """A wording that the model may be trained with: a trained cell, sometimes a verb form or a prefix."""
    if rng.random() < 0.15:
        forms = verb_forms(attribute)
        question = forms[rng.integers(len(forms))].format(s=subject)
    else:
        trained = cells(attribute, held_out=False)
        question = ask(attribute, trained[rng.integers(len(trained))], subject)
    if attribute != CAPTION and rng.random() < 0.15:
        question = f"{PREFIXES[rng.integers(len(PREFIXES))]} {question}"
    return question
