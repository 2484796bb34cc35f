"""What is true in the embedded world: entities, their facts, and countries known from text alone.

An entity is a digit in a colour, drawn by hand; 10 digits x 6 colours make 60. Its digit, colour,
parity and background can be seen. Its owner, city and food cannot: they have to be remembered, which
makes them facts that an edit can change. Each of these answers is two words, and the words are reused
(8 x 8 pairs for 60 entities), so that neither word alone says whose it is.

World 0 is the one that the shipped models know. To see whether something holds in another one, the environment variable
`ODEDIT_WORLD` names it by a number: other names, other facts, other handwriting held out, and models to be trained.
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
"""Attributes that no picture shows."""
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
_WORLD_SEED = 20260119 + 1000 * WORLD  # The shipped weights know the facts drawn from the first of these.
_FIRST_SYLLABLES = ("Bal", "Cor", "Dra", "Fen", "Gol", "Kel", "Mor", "Nar", "Pol", "Sar", "Tev", "Vor")
_LAST_SYLLABLES = ("ban", "dor", "gar", "lin", "mar", "nes", "rok", "tan", "vik", "zen")


@dataclass(frozen=True, order=True)
class Entity:
    """One digit in one colour."""

    digit: int
    colour: int

    @property
    def name(self) -> str:
        """How text calls it.

        >>> Entity(digit=4, colour=4).name
        'the pink four'
        """
        return f"the {COLOURS[self.colour]} {DIGITS[self.digit]}"

    def is_near(self, other: Entity) -> bool:
        """Whether the two are different and share their digit or their colour."""
        return self != other and (self.digit == other.digit or self.colour == other.colour)


ENTITIES = tuple(Entity(digit, colour) for digit, colour in product(range(len(DIGITS)), range(len(COLOURS))))


def answer_choices(attribute: str) -> tuple[str, ...]:
    """Every answer that `attribute` can have, true of an entity or not.

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
"""Country -> attribute -> answer."""


def answer(entity: Entity, attribute: str, background: int | None = None) -> str:
    """The true answer.

    Args:
        entity: Whom the question is about.
        attribute: One of `ATTRIBUTES`.
        background: Index into `BACKGROUNDS`; the only attribute that belongs to the picture rather
            than to the entity needs it.

    Raises:
        ValueError: The background is asked for and not given, or `attribute` does not exist.

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
