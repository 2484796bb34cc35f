"""Copies of pictures."""

from __future__ import annotations

import numpy as np
import pytest

from odedit.data.variation import altered, variations
from odedit.inputs.batch import Picture

PICTURE = Picture("red", np.full((16, 16, 3), (200, 40, 40), dtype=np.uint8))
OTHER = Picture("dark", np.full((24, 20, 3), (20, 0, 0), dtype=np.uint8))


def altered_alone(picture: Picture, count: int, purpose: str, seed: int = 0) -> list[Picture]:
    return altered(picture, (), count, purpose, seed)


def altered_with_another(picture: Picture, count: int, purpose: str, seed: int = 0) -> list[Picture]:
    return altered(picture, (OTHER,), count, purpose, seed)


@pytest.mark.parametrize("made", [variations, altered_alone, altered_with_another])
def test_copies_are_the_same_for_the_same_arguments_and_have_other_keys(made) -> None:
    first, second = made(PICTURE, 3, "own", seed=1), made(PICTURE, 3, "own", seed=1)
    assert [copy.key for copy in first] == [copy.key for copy in second]
    assert len({PICTURE.key, *(copy.key for copy in first)}) == 4
    for copy, again in zip(first, second, strict=True):
        assert copy.pixels.shape == PICTURE.pixels.shape and copy.pixels.dtype == np.uint8
        assert (copy.pixels == again.pixels).all()
    other = made(PICTURE, 3, "own", seed=2)
    assert any((copy.pixels != again.pixels).any() for copy, again in zip(first, other, strict=True))


def test_altered_copies_have_other_hues() -> None:
    """The picture is red: its varied copies stay red, and among altered ones green or blue leads."""
    for made, leading in ((variations, {0}), (altered_alone, {0, 1, 2})):
        assert {int(copy.pixels.mean((0, 1)).argmax()) for copy in made(PICTURE, 12, "own")} == leading


def test_altered_copies_are_mirrored_or_not() -> None:
    pixels = PICTURE.pixels.copy()
    pixels[:, :4] = 0
    copies = altered_alone(Picture("left dark", pixels), 12, "own")
    is_left = {bool(copy.pixels[:, :4].mean() < copy.pixels[:, -4:].mean()) for copy in copies}
    assert is_left == {True, False}


def test_every_second_altered_copy_is_joined_with_another_picture() -> None:
    shares = [float((copy.pixels.max(-1) < 60).mean()) for copy in altered_with_another(PICTURE, 8, "own")]
    assert all(share == 0 for share in shares[::2]) and all(0.1 < share < 0.9 for share in shares[1::2])
    assert all((copy.pixels.max(-1) > 60).all() for copy in altered_alone(PICTURE, 8, "own"))
