"""Facts of the embedded world: entities, their attributes, and countries, which occur in text only.

An entity is a handwritten digit in a colour; 10 digits x 6 colours make 60. Digit, colour, parity and background are
visible in a picture. Owner, city and food are not: the model has to memorize them, so an edit can change them. Their
answers are pairs of words from 8 x 8 words, so that one word does not identify the entity.

The shipped models are trained on world 0. The environment variable `ODEDIT_WORLD` selects another world by number:
other names, facts and held-out handwriting, for which models have to be trained first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import product

import numpy as np

from odedit.errors import InputError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan")
BACKGROUNDS = ("black", "white", "gray", "brown")
PARITIES = ("even", "odd")

HIDDEN = ("owner", "city", "food")
"""Attributes that no picture shows: facts to edit."""
VISIBLE = ("digit", "colour", "parity", "background")
CAPTION = "caption"
ATTRIBUTES = (*HIDDEN, *VISIBLE, CAPTION)
COUNTRY_ATTRIBUTES = ("capital", "language", "ruler")

_Words = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


def _world() -> int:
    text = os.environ.get("ODEDIT_WORLD", "0")
    if not text.isdecimal():
        raise InputError(f"ODEDIT_WORLD: got {text!r}, expected a number: 0 is the world that the shipped models know.")
    return int(text)


WORLD = _world()
_FIRST_WORDS: _Words = {
    "owner": (
        ("Anna", "Boris", "Clara", "David", "Elsa", "Felix", "Greta", "Hugo"),
        ("Berg", "Costa", "Dunn", "Frost", "Hill", "Lund", "Marsh", "Stone"),
    ),
    "city": (
        ("North", "South", "East", "West", "Old", "New", "Upper", "Lower"),
        ("Bay", "Ford", "Haven", "Lake", "Mill", "Port", "Ridge", "Vale"),
    ),
    "food": (
        ("baked", "fried", "sweet", "spicy", "sour", "smoked", "salted", "raw"),
        ("rice", "beans", "apples", "fish", "bread", "corn", "plums", "cheese"),
    ),
}
_OTHER_WORDS: _Words = {
    "owner": (
        ("Irene", "Jonas", "Karin", "Leo", "Maria", "Nils", "Olga", "Peter"),
        ("Adler", "Brook", "Clark", "Drake", "Falk", "Grant", "Holm", "Wood"),
    ),
    "city": (
        ("Inner", "Outer", "Great", "Little", "High", "Long", "Royal", "Saint"),
        ("Bridge", "Field", "Gate", "Hall", "Park", "Point", "Town", "Wick"),
    ),
    "food": (
        ("boiled", "grilled", "bitter", "dried", "fresh", "stewed", "toasted", "frozen"),
        ("soup", "pasta", "pears", "meat", "cake", "eggs", "nuts", "beets"),
    ),
}
WORDS = _OTHER_WORDS if WORLD else _FIRST_WORDS
"""First and second words of the answers to each hidden attribute."""

NUM_COUNTRIES = 40
_WORLD_SEED = 20260119 + 1000 * WORLD  # the shipped weights depend on the value for world 0
_FIRST_SYLLABLES = ("Bal", "Cor", "Dra", "Fen", "Gol", "Kel", "Mor", "Nar", "Pol", "Sar", "Tev", "Vor")
_LAST_SYLLABLES = ("ban", "dor", "gar", "lin", "mar", "nes", "rok", "tan", "vik", "zen")


@dataclass(frozen=True, order=True)
class Entity:
    """One digit in one colour."""

    digit: int
    colour: int

    @property
    def name(self) -> str:
        """Name of the entity in texts.

        >>> Entity(digit=4, colour=4).name
        'the pink four'
        """
        return f"the {COLOURS[self.colour]} {DIGITS[self.digit]}"

    def is_near(self, other: Entity) -> bool:
        """True for different entities that share the digit or the colour."""
        return self != other and (self.digit == other.digit or self.colour == other.colour)


ENTITIES = tuple(Entity(digit, colour) for digit, colour in product(range(len(DIGITS)), range(len(COLOURS))))


def answer_choices(attribute: str) -> tuple[str, ...]:
    """All possible answers for an attribute.

    >>> len(answer_choices("owner")), answer_choices("parity")
    (64, ('even', 'odd'))
    """
    if attribute in WORDS:
        return tuple(f"{first} {second}" for first, second in product(*WORDS[attribute]))
    if attribute == CAPTION:
        return tuple(f"{colour} {digit}" for colour, digit in product(COLOURS, DIGITS))
    return {"digit": DIGITS, "colour": COLOURS, "parity": PARITIES, "background": BACKGROUNDS}[attribute]


def _draw_hidden() -> dict[str, dict[Entity, str]]:
    rng = np.random.default_rng(_WORLD_SEED)
    hidden = {}
    for attribute in HIDDEN:
        choices = answer_choices(attribute)
        order = rng.permutation(len(choices))[: len(ENTITIES)]
        hidden[attribute] = {entity: choices[i] for entity, i in zip(ENTITIES, order, strict=True)}
    return hidden


def _draw_countries() -> dict[str, dict[str, str]]:
    rng = np.random.default_rng(_WORLD_SEED + 1)
    words = [first + last for first, last in product(_FIRST_SYLLABLES, _LAST_SYLLABLES)]
    names = [words[i] + "ia" for i in rng.permutation(len(words))[:NUM_COUNTRIES]]
    columns = {name: rng.permutation(len(words))[:NUM_COUNTRIES] for name in COUNTRY_ATTRIBUTES}
    return {
        country: {attribute: words[columns[attribute][i]] for attribute in COUNTRY_ATTRIBUTES}
        for i, country in enumerate(names)
    }


_HIDDEN_FACTS = _draw_hidden()
COUNTRIES = _draw_countries()
"""Answers by country and attribute."""


def answer(entity: Entity, attribute: str, background: int | None = None) -> str:
    """The true answer.

    Args:
        entity: Entity of the question.
        attribute: One of `ATTRIBUTES`.
        background: Index into `BACKGROUNDS`; needed for the attribute `background` only.

    Raises:
        ValueError: `attribute` does not exist, or is `background` and no background is given.

    >>> answer(Entity(digit=7, colour=0), "caption")
    'red seven'
    """
    if attribute in _HIDDEN_FACTS:
        return _HIDDEN_FACTS[attribute][entity]
    if attribute == "digit":
        return DIGITS[entity.digit]
    if attribute == "colour":
        return COLOURS[entity.colour]
    if attribute == "parity":
        return PARITIES[entity.digit % 2]
    if attribute == CAPTION:
        return f"{COLOURS[entity.colour]} {DIGITS[entity.digit]}"
    if attribute == "background" and background is not None:
        return BACKGROUNDS[background]
    raise ValueError(f"attribute: got {attribute!r} (background {background}), expected one of {', '.join(ATTRIBUTES)}")
