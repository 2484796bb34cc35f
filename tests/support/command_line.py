"""Commands of `odedit` that pages and files show."""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from odedit.__main__ import app


def wrong_in(words: list[str]) -> str:
    """The first word that is no command or no option of the command, or ""."""
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        name, *words = words
        if name not in command.commands:
            return name
        command = command.commands[name]
    if hasattr(command, "commands"):
        return "an incomplete command"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = [word.split("=")[0] for word in words[: words.index("--") if "--" in words else None]]
    return next((option for option in options if option.startswith("--") and option not in known), "")
