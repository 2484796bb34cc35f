"""Figures as tables show them."""

from __future__ import annotations

from odedit.evaluation.columns import FURTHER, METRICS, PARTS
from odedit.evaluation.statistics import Estimate, PairedDifference
from pipeline.report.differences import Difference

LABELS = (
    {name: metric.label for name, metric in METRICS.items()}
    | PARTS
    | {name: metric.label for name, metric in FURTHER.items()}
)
"""Columns spelled out."""


def number(value: float) -> str:
    """`.830` for a share, fewer digits for large figures."""
    if abs(value) >= 1e4:
        return f"{value:.3g}"
    if abs(value) >= 10:
        return f"{value:.0f}"
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def plain(value: float) -> str:
    """`400` for a whole number, `0.25` and `12.5` for others: three significant digits."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def plus_minus(value: Estimate | PairedDifference) -> str:
    """`.830 ±.027`: a mean and half its interval, the longer half."""
    return f"{number(value.mean)} ±{number(max(value.high - value.mean, value.mean - value.low))}"


def interval(value: Estimate) -> str:
    """`0.913 [0.880, 0.946]`: a mean and its interval."""
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def counts_interval(value: Estimate) -> str:
    """`400`, `19.5 [17.2, 21.8]`: a mean of whole numbers and its interval, which equal numbers do not have."""
    mean, low, high = (f"{each:,.1f}".removesuffix(".0") for each in (value.mean, value.low, value.high))
    return mean if low == high else f"{mean} [{low}, {high}]"


def change(difference: PairedDifference, digits: int = 3) -> str:
    """`+0.012 [+0.003, +0.020]`: a difference and its interval."""
    return f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def sign(difference: Difference | None) -> str:
    """` ▲` or ` ▼` if the difference is significant after correction."""
    if difference is None or not difference.is_clear:
        return ""
    return " ▲" if difference.mean > 0 else " ▼"


def p_value(p: float | None) -> str:
    """`0.012`; `-` without a test."""
    if p is None or p != p:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
