"""Paired differences between runs: which records count, and over which tests p is corrected."""

from __future__ import annotations

import math
from typing import Any

import pytest

from odedit.evaluation.score import paired_score
from odedit.evaluation.statistics import MAIN, paired
from pipeline.report import differences
from pipeline.run_folder.rows import EDITED, FAILED


def rows(offset: float, **changes: Any) -> dict[str, Any]:
    """Twelve edited records of six facts; the gain of `offset` varies from record to record."""
    values = {f"e{n}": 0.5 + offset * (1 + n % 5 / 10) for n in range(12)}
    return {
        key: {"edit_id": key, "fact": f"f{n // 2}", "status": EDITED, **dict.fromkeys(MAIN, value)} | changes
        for n, (key, value) in enumerate(values.items())
    }


def test_p_is_corrected_over_the_pairs_column_by_column() -> None:
    base, better = rows(0.0), rows(0.1)
    pairs = {"a": (base, better), "b": (base, rows(0.0)), "c": (base, {})}
    found = differences.differences(pairs, ("rel", "seconds"), with_score=True)
    assert list(found) == ["a", "b", "c"] and list(found["a"]) == ["score", "rel"] and not found["c"]
    test, total = paired(base, better)["rel"], paired_score(base, better)
    assert total is not None
    assert found["a"]["rel"].p == test.p and found["a"]["rel"].p_holm == pytest.approx(2 * test.p)
    assert found["a"]["score"].p_holm == pytest.approx(2 * total.p)
    assert found["a"]["rel"].is_clear and not found["b"]["rel"].is_clear


def test_without_a_test_there_is_nothing_to_correct() -> None:
    first, second = rows(0.0), rows(0.0)
    for row in second.values():
        row["rel"] += 0.25
    found = differences.corrected(paired(first, second))
    assert math.isnan(found["rel"].p_holm) and not found["rel"].is_clear
    assert found["t_gen"].p_holm == 1.0


def test_both_means_are_over_the_records_in_common() -> None:
    first, second = rows(0.0), rows(0.1)
    del first["e0"]
    second["e1"]["rel"] = None
    second["e2"]["status"] = FAILED
    (rel, *others) = differences.compare(first, differences.edited(second.values()), (*MAIN, "seconds"))
    assert rel.column == "rel" and rel.first.n == rel.second.n == rel.difference.n == 9
    assert rel.second.mean - rel.first.mean == pytest.approx(rel.difference.mean)
    assert [line.column for line in others] == list(MAIN[1:]) and others[0].difference.n == 10
