"""Means with confidence intervals, paired tests, and corrections for multiple tests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from odedit.evaluation.columns import FURTHER, METRICS, PARTS

SIGNIFICANT = 0.05
"""Level of significance: largest p of a difference that is reported as significant."""
MAIN = tuple(METRICS)
"""The five metrics of MMEdit, which the score is made of."""
SHOWN = (*MAIN, *PARTS, *FURTHER)
"""The main columns of every table, in their order."""
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """Mean over n values with its 95% confidence interval (Student's t)."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of b - a over the n records that both have, its 95% interval, and p of the paired t-test."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean and interval; for a single value, or equal values, the interval is the mean itself.

    Args:
        clusters: Cluster of each value, such as its fact: edits of one fact are not independent. The variance is
            cluster-robust, with (clusters - 1) degrees of freedom. None: every value is its own cluster.

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
    """Cluster-robust standard error of the mean; the ordinary error if every value is its own cluster."""
    groups = range(len(values)) if clusters is None else clusters
    sums: dict[Any, float] = {}
    for group, value in zip(groups, values, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    if len(sums) < 2:
        return 0.0
    error = math.sqrt(math.fsum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)) / len(values)
    # Equal values differ from their mean by rounding only: no spread, and no tiny p.
    return error if error > _ROUNDING * max(map(abs, values)) else 0.0


def _num_clusters(values: Sequence[float], clusters: Sequence[Hashable] | None) -> int:
    return len(values) if clusters is None else len(set(clusters))


def _t_quantile(num_clusters: int) -> float:
    from scipy.special import stdtrit  # Student's t; importing scipy.stats takes a third of a second

    return float(stdtrit(num_clusters - 1, 0.975)) if num_clusters > 1 else 0.0


def summarize(rows: Sequence[Mapping[str, Any]], facts: Sequence[str] | None = None) -> dict[str, Estimate]:
    """`Estimate` of every numeric column over the rows that have it; the interval of a share is clipped to [0, 1].

    Args:
        facts: Fact of each row's edit, by which the intervals are clustered; None: rows are independent.
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
    """`estimate` of finite values, the interval clipped to [0, 1] if all values are in it."""
    result = estimate(values, clusters)
    if min(values) < 0.0 or max(values) > 1.0:
        return result
    return replace(result, low=max(result.low, 0.0), high=min(result.high, 1.0))


def paired(
    a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = MAIN
) -> dict[str, PairedDifference]:
    """b - a for every metric, over the edits that both runs have, matched by edit id.

    The test is the paired t-test, clustered by the column `fact` where rows have it.
    """
    from scipy.special import stdtr

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
        # Without spread the t statistic is not defined: p is 1 for no difference, else NaN.
        if error == 0.0:
            p = 1.0 if summary.mean == 0 else math.nan
        else:
            p = float(2 * stdtr(len(set(clusters)) - 1, -abs(summary.mean) / error))
        result[metric] = PairedDifference(summary.mean, summary.low, summary.high, p, summary.n)
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p corrected by Holm's step-down method (1979); NaN stays NaN and is not counted.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    known = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    corrected, largest = {}, 0.0
    for rank, (value, name) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        corrected[name] = largest
    return corrected | {name: math.nan for name, value in p.items() if math.isnan(value)}
