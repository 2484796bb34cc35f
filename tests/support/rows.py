"""Rows of two runs that edited the same."""

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
    """Equal up to rounding: a product's depends on which pictures or edits share a batch, on some processors."""
    kept = [[{key: row[key] for key in row if key not in NOT_REPRODUCIBLE} for row in one] for one in (rows, expected)]
    assert kept[0] == near(kept[1])
