"""Text for people, printed as it is."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints text without wrapping, colouring or reading markup in it: it may hold paths and names of any kind."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
