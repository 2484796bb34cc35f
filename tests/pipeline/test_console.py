"""When a page opens in a browser by itself."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from pipeline.console import open_page


class Desktop(webbrowser.BackgroundBrowser):
    """A browser that notes what it opens."""

    def __init__(self) -> None:
        super().__init__("browser")
        self.opened: list[str] = []

    def open(self, url: str, new: int = 0, autoraise: bool = True) -> bool:
        self.opened.append(url)
        return True


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> Desktop:
    """A terminal on a desktop with a browser."""
    found = Desktop()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(webbrowser, "get", lambda: found)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    return found


def test_a_page_opens_at_a_desktop(browser: Desktop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_page("a page.html")
    assert browser.opened == [f"{tmp_path.as_uri()}/a%20page.html"]


def in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")


def without_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)


def into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)


def over_ssh_to_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 50000 10.0.0.2 22")


def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", fail)


def browser_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "get", lambda: webbrowser.GenericBrowser("true"))


@pytest.mark.parametrize(
    "change", [in_ci, without_display, into_a_file, over_ssh_to_a_mac, no_browser, browser_of_the_terminal]
)
def test_nothing_opens_elsewhere(browser: Desktop, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    change(monkeypatch)
    assert not open_page("page.html") and not browser.opened
