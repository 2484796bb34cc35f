"""Output of text without markup, and pages that open in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints text without wrapping, colours or markup, since it may hold arbitrary paths and names."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def open_page(path: str) -> bool:
    """Opens a local page in the desktop's browser, and returns whether it did.

    Only for somebody at a desktop: standard output is a terminal, there is a display, and it is no continuous
    integration (`CI`). A browser that would take over the terminal is not started.
    """
    if not sys.stdout.isatty() or os.environ.get("CI") or not _has_desktop():
        return False
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    if type(browser) is webbrowser.GenericBrowser:  # lynx, w3m
        return False
    return bool(browser.open(Path(path).absolute().as_uri()))


def _has_desktop() -> bool:
    """Whether this process can show windows on the user's own screen."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
