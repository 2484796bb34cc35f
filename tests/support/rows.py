"""Comparison of the result rows of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.run_folder.rows import NOT_REPRODUCIBLE


def near(value: Any) -> Any:
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True)
    if isinstance(value, dict):
        return {key: near(inner) for key, inner in value.items()}
    return [near(inner) for inner in value] if isinstance(value, list) else value


def assert_same(rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Asserts equality up to rounding, which on some processors depends on what shares a batch."""
    kept = [[{key: row[key] for key in row if key not in NOT_REPRODUCIBLE} for row in run] for run in (rows, expected)]
    assert kept[0] == near(kept[1])
