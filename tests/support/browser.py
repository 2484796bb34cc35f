"""A headless Chromium, Debian's or the system's own, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser; skips the test, with the reason, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[dev]'")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium, so pages are only read as text: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Containers have no user namespaces for Chromium's sandbox; the pages are the test's own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


CONTRAST = """
() => {
  const channels = (text) => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const linear = (c) => c / 255 <= .03928 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
  const light = (v) => .2126 * linear(v[0]) + .7152 * linear(v[1]) + .0722 * linear(v[2]);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const v = channels(getComputedStyle(node).backgroundColor);
      if (v[3] === 1) return v;
    }
    return [255, 255, 255, 1];
  };
  const poor = new Set();
  for (const node of document.querySelectorAll("body *")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!hasText || !node.checkVisibility() || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.add(`${node.tagName} ${node.className}: ${ratio.toFixed(2)}`);
  }
  return [...poor];
}
"""
"""Script that returns the visible texts whose contrast is below 4.5, the bound of WCAG 2.2 AA."""
