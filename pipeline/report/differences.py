"""Paired comparisons: means of result columns, and their differences between runs on the same records."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from odedit.evaluation.score import SCORE, paired_score
from odedit.evaluation.statistics import SIGNIFICANT, Estimate, PairedDifference, holm, paired, summarize
from pipeline.run_folder.rows import EDITED, Row

Rows = Mapping[str, Row]
"""Edited records by id, or by whatever identifies a record in all runs."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference(PairedDifference):
    """A paired difference that is one of several tests.

    Attributes:
        p_holm: p after Holm's correction over these tests; NaN without a test.
    """

    p_holm: float

    @property
    def is_clear(self) -> bool:
        return self.p_holm < SIGNIFICANT


def edited(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows of edited records, by edit id."""
    return {row["edit_id"]: row for row in rows if row["status"] == EDITED}


def fact(row: Row) -> str:
    """The fact that a record is about: intervals and tests are clustered by it. The edit id if the row names none."""
    return str(row.get("fact") or row["edit_id"])


def means(rows: Iterable[Row], columns: Iterable[str]) -> dict[str, Estimate]:
    """Mean and 95% interval of each column over the rows that have it."""
    rows, columns = list(rows), list(columns)
    return summarize([{column: row.get(column) for column in columns} for row in rows], [fact(row) for row in rows])


def differences(
    pairs: Mapping[Key, tuple[Rows, Rows]], columns: Sequence[str], *, with_score: bool = False
) -> dict[Key, dict[str, Difference]]:
    """Second minus first run of every pair, by column; each column's p is corrected over the pairs.

    Args:
        pairs: Two runs' rows by any name.
        columns: Compared columns; one without a common record is left out.
        with_score: Compare the score, too.
    """
    tests = {name: paired(first, second, columns) for name, (first, second) in pairs.items()}
    if with_score:
        totals = {name: paired_score(first, second) for name, (first, second) in pairs.items()}
        tests = {name: ({SCORE: total} if total else {}) | tests[name] for name, total in totals.items()}
    result: dict[Key, dict[str, Difference]] = {name: {} for name in tests}
    for column in (SCORE, *columns):
        of_column = {name: by_column[column] for name, by_column in tests.items() if column in by_column}
        for name, difference in corrected(of_column).items():
            result[name][column] = difference
    return result


def corrected(tests: Mapping[Key, PairedDifference]) -> dict[Key, Difference]:
    """The tests with Holm's correction over all of them."""
    keys = {str(index): key for index, key in enumerate(tests)}
    p_holm = holm({index: tests[key].p for index, key in keys.items()})
    return {key: Difference(**asdict(tests[key]), p_holm=p_holm[index]) for index, key in keys.items()}


@dataclass(frozen=True)
class Comparison:
    """One column of two runs on their common records.

    Attributes:
        column: Name of the column.
        first: Mean of the first run over the records in which both runs have the column.
        second: Mean of the second run over the same records.
        difference: Second minus first.
    """

    column: str
    first: Estimate
    second: Estimate
    difference: PairedDifference


def compare(first: Rows, second: Rows, columns: Sequence[str]) -> list[Comparison]:
    """Both runs' means beside their difference, for every column that they have on a common record."""
    comparisons = []
    for column, difference in paired(first, second, columns).items():
        common = [key for key in sorted(first.keys() & second.keys())
                  if first[key].get(column) is not None and second[key].get(column) is not None]  # fmt: skip
        before, after = (means([run[key] for key in common], [column])[column] for run in (first, second))
        comparisons.append(Comparison(column, before, after, difference))
    return comparisons
