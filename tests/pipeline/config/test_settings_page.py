"""The page of settings agrees with the code."""

from __future__ import annotations

from pathlib import Path

import pipeline
from pipeline.config import settings_page

PAGE = Path(pipeline.__file__).parent / "SETTINGS.md"


def test_the_page_is_up_to_date() -> None:
    hint = "run: python -m pipeline.config.settings_page > pipeline/SETTINGS.md"
    assert PAGE.read_text(encoding="utf-8") == settings_page.page(), hint


def test_every_setting_has_a_meaning_and_a_default() -> None:
    rows = [line.split(" | ") for line in settings_page.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    for row in rows:
        assert len(row) == 4 and row[2].strip("` ") and row[3].strip("| "), row
