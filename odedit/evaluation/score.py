"""Score of a set of edits: the harmonic mean of the five metrics, with a test for the difference of two sets.

A harmonic mean is low if a single metric is low, as for an editor that changes every answer, or none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from odedit.evaluation.statistics import MAIN, PairedDifference

SCORE = "score"
"""Name of the score beside the names of the metrics."""
Rows = Mapping[str, Mapping[str, Any]]


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean; 0 if a value is 0, NaN without values.

    >>> harmonic_mean([1.0, 0.5])
    0.6666666666666666
    """
    if not values:
        return math.nan
    return len(values) / math.fsum(1.0 / value for value in values) if min(values) > 0.0 else 0.0


def score(rows: Sequence[Mapping[str, Any]]) -> float:
    """Harmonic mean of the means of the five metrics, each over the rows that have it; NaN without any."""
    return harmonic_mean([mean for metric in MAIN if (mean := _mean(rows, metric)) is not None])


def score_of_means(means: Mapping[str, Mapping[str, float]], failed: int) -> float:
    """`score` of a run from its means: a failed record counts as 0 in every metric, so that no run wins by failing.

    Args:
        means: `mean` over `n` edited records by column.
        failed: Number of failed records.

    >>> score_of_means({"rel": {"mean": 1.0, "n": 3}, "t_loc": {"mean": 1.0, "n": 3}}, failed=1)
    0.75
    """
    known = (means[metric] for metric in MAIN if metric in means)
    return harmonic_mean([each["mean"] * each["n"] / (each["n"] + failed) for each in known])


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    values = [row[metric] for row in rows if isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])]
    return math.fsum(values) / len(values) if values else None


def paired_score(a: Rows, b: Rows) -> PairedDifference | None:
    """score(b) - score(a) over the edits that both have, matched by edit id; None if there are none.

    The score is not a mean over edits, so its error is that of the jackknife: one fact is left out at a time (one edit,
    where rows have no `fact`). Interval and p are those of Student's t with (facts - 1) degrees of freedom.

    References:
        Efron and Stein (1981), The Jackknife Estimate of Variance.
    """
    from scipy import stats

    shared = sorted(a.keys() & b.keys())
    facts: dict[str, list[str]] = {}
    for key in shared:
        facts.setdefault(str(a[key].get("fact") or key), []).append(key)
    difference = _difference(a, b, shared)
    if not shared or math.isnan(difference):
        return None
    if len(facts) < 2:
        return PairedDifference(difference, difference, difference, math.nan, len(shared))
    without = []
    for left_out in facts.values():
        excluded = set(left_out)
        without.append(_difference(a, b, [key for key in shared if key not in excluded]))
    centre = math.fsum(without) / len(without)
    error = math.sqrt((len(facts) - 1) / len(facts) * math.fsum((value - centre) ** 2 for value in without))
    if error < 1e-12:
        return PairedDifference(difference, difference, difference, 1.0 if difference == 0 else math.nan, len(shared))
    half = error * float(stats.t.ppf(0.975, len(facts) - 1))
    p = float(2 * stats.t.sf(abs(difference) / error, len(facts) - 1))
    return PairedDifference(difference, difference - half, difference + half, p, len(shared))


def _difference(a: Rows, b: Rows, keys: Sequence[str]) -> float:
    return score([b[key] for key in keys]) - score([a[key] for key in keys])
