"""Copies of pictures."""

from __future__ import annotations

import numpy as np
import pytest

from odedit.data.variation import recoloured, variations
from odedit.inputs.batch import Picture

PICTURE = Picture("key", np.full((16, 16, 3), (200, 40, 40), dtype=np.uint8))


@pytest.mark.parametrize("made", [variations, recoloured])
def test_copies_are_the_same_for_the_same_arguments_and_have_other_keys(made) -> None:
    first, second = made(PICTURE, 3, "own", seed=1), made(PICTURE, 3, "own", seed=1)
    assert [copy.key for copy in first] == [copy.key for copy in second]
    assert len({PICTURE.key, *(copy.key for copy in first)}) == 4
    for copy, again in zip(first, second, strict=True):
        assert copy.pixels.shape == PICTURE.pixels.shape and copy.pixels.dtype == np.uint8
        assert (copy.pixels == again.pixels).all()
    other = made(PICTURE, 3, "own", seed=2)
    assert any((copy.pixels != again.pixels).any() for copy, again in zip(first, other, strict=True))


def test_only_recoloured_copies_have_other_colours() -> None:
    """The picture is red: its varied copies stay red, and among recoloured ones green or blue leads."""
    strongest = {
        made: [int(copy.pixels.mean((0, 1)).argmax()) for copy in made(PICTURE, 12, "own")]
        for made in (variations, recoloured)
    }
    assert set(strongest[variations]) == {0}
    assert set(strongest[recoloured]) == {0, 1, 2}
