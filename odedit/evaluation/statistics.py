"""Means with confidence intervals, paired tests, and corrections for many of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from odedit.evaluation.columns import METRICS

SIGNIFICANT = 0.05
"""Largest p of a difference that is called one."""
MAIN = tuple(METRICS)
"""The five metrics of MMEdit, in the order of every table."""
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over n values with its 95% confidence interval (Student's t)."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of b - a over the n records that both have, its 95% interval, and the paired t-test's p."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean and interval; the interval is the mean itself for one value, or when all are equal.

    Args:
        clusters: What each value belongs to. Edits of one fact are not independent, so the interval is made from the
            facts: cluster-robust variance, degrees of freedom one less than clusters. None: every value is its own.

    References:
        Cameron and Miller (2015), A Practitioner's Guide to Cluster-Robust Inference, for the mean alone.

    >>> estimate([1.0, 1.0]).low
    1.0
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    half = _standard_error(values, mean, clusters) * _t_quantile(_num_clusters(values, clusters))
    return Estimate(mean, mean - half, mean + half, n)


def _standard_error(values: Sequence[float], mean: float, clusters: Sequence[Hashable] | None) -> float:
    """Of the mean; with every value its own cluster it is the ordinary one."""
    groups = range(len(values)) if clusters is None else clusters
    sums: dict[Any, float] = {}
    for group, value in zip(groups, values, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    if len(sums) < 2:
        return 0.0
    error = math.sqrt(math.fsum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)) / len(values)
    # Equal values are off their mean by rounding: no spread, and no ground for a tiny p.
    return error if error > _ROUNDING * max(map(abs, values)) else 0.0


def _num_clusters(values: Sequence[float], clusters: Sequence[Hashable] | None) -> int:
    return len(values) if clusters is None else len(set(clusters))


def _t_quantile(num_clusters: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, num_clusters - 1)) if num_clusters > 1 else 0.0


def summarize(rows: Sequence[Mapping[str, Any]], facts: Sequence[str] | None = None) -> dict[str, Estimate]:
    """An `Estimate` of every numeric column over the rows that have it.

    A share lies between 0 and 1, and so does its interval.

    Args:
        facts: What each row's edit is about; the intervals are clustered by it.
    """
    columns: dict[str, tuple[list[float], list[str]]] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                values, clusters = columns.setdefault(name, ([], []))
                values.append(float(value))
                clusters.append(str(number) if facts is None else facts[number])
    return {name: estimate_column(values, clusters) for name, (values, clusters) in columns.items()}


def estimate_column(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """As `estimate`, of finite values; of shares, whose interval lies between 0 and 1 as they do."""
    return _within_its_range(estimate(values, clusters), values)


def _within_its_range(found: Estimate, values: Sequence[float]) -> Estimate:
    if min(values) < 0.0 or max(values) > 1.0:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def paired(
    a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = MAIN
) -> dict[str, PairedDifference]:
    """b - a for every metric, over the edits that both runs have, by edit id.

    The test is the paired t-test, clustered by the column `fact` where rows have it: then the facts are what is
    compared, not their edits.
    """
    from scipy import stats

    result = {}
    for metric in metrics:
        shared = [
            k for k in sorted(a.keys() & b.keys()) if _is_number(a[k].get(metric)) and _is_number(b[k].get(metric))
        ]
        if not shared:
            continue
        differences = [float(b[key][metric]) - float(a[key][metric]) for key in shared]
        clusters = [str(a[key].get("fact") or key) for key in shared]
        summary = estimate(differences, clusters)
        error = _standard_error(differences, summary.mean, clusters)
        # Without any spread the t statistic is 0/0: no difference, or the same one everywhere.
        if error == 0.0:
            p = 1.0 if summary.mean == 0 else math.nan
        else:
            p = float(2 * stats.t.sf(abs(summary.mean) / error, len(set(clusters)) - 1))
        result[metric] = PairedDifference(summary.mean, summary.low, summary.high, p, summary.n)
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979); NaN where there is no test.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    known = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    corrected, largest = {}, 0.0
    for place, (value, name) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - place)))
        corrected[name] = largest
    return corrected | {name: math.nan for name, value in p.items() if math.isnan(value)}
