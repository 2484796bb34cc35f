"""Edits that are one vector each, as a way reads them that writes vectors into weights."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

VECTOR = "residual"
"""Name of the vectors in `EditParams`, `(E, D)`."""


@runtime_checkable
class Vectors(Protocol):
    """An editor whose edits are vectors that are added to a site's output wherever the answer is predicted.

    Attributes:
        vector_site: The site; D is the width of its output.
    """

    vector_site: str
