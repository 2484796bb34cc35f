"""Output of text without markup."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints text without wrapping, colours or markup, since it may hold arbitrary paths and names."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
