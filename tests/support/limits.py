"""Small device budgets, which split the little that tests compute into parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from odedit.runtime.budgets import BUDGETS


def set_limits(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    """Changes budgets of the CPU for one test."""
    monkeypatch.setitem(BUDGETS, "cpu", replace(BUDGETS["cpu"], **limits))
