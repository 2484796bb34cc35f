"""Numbers as tables show them."""

from __future__ import annotations

from odedit.evaluation.statistics import SIGNIFICANT, Estimate, PairedDifference


def plus_minus(found: Estimate | PairedDifference) -> str:
    """`.830 ±.027`: a mean and half its interval, the longer one."""
    return f"{number(found.mean)} ±{number(max(found.high - found.mean, found.mean - found.low))}"


def sign(change: PairedDifference | None, p: float) -> str:
    """` ▲` or ` ▼` if the difference is one after correction."""
    if change is None or not p < SIGNIFICANT:
        return ""
    return " ▲" if change.mean > 0 else " ▼"


def number(value: float) -> str:
    """`.830` for a share, fewer digits for large figures."""
    if abs(value) >= 1e4:
        return f"{value:.3g}"
    if abs(value) >= 10:
        return f"{value:.0f}"
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
