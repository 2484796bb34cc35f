"""Order of the tests, their division among the processes of pytest-xdist, and those that `make check` leaves out.

All follow `tests/seconds.txt`, which lists test files and tests that take long, with their CPU seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.support.paths import ROOT

SECONDS = ROOT / "tests" / "seconds.txt"


def seconds() -> dict[str, float]:
    """CPU seconds by file, or by test without its parameters (`tests/test_cli.py::test_edit_and_apply`)."""
    lines = SECONDS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {name: float(value) for value, name in pairs}


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Marks as `slow` each test that starts a Ray, that is listed, or whose file is listed."""
    listed = seconds()
    for item in items:
        if item.get_closest_marker("ray") or not listed.keys().isdisjoint(_names(item)):
            item.add_marker(pytest.mark.slow)


def distribute(items: list[pytest.Item]) -> None:
    """Gives every test a group for `--dist loadgroup`, and puts the groups that take longest first.

    The tests of a file share fixtures and are a group. Tests that start a Ray are two groups, so that at most two run
    at a time: they wait a lot, but a Ray with its workers takes memory.
    """
    groups = {item: _group(item) for item in items}
    listed, total = seconds(), dict.fromkeys(groups.values(), 0.0)
    names: dict[str, str] = {}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
        names |= {name: group for name in _names(item)}
    for name in listed.keys() & names.keys():
        total[names[name]] += listed[name]
    items.sort(key=lambda item: -total[groups[item]])


def _group(item: pytest.Item) -> str:
    file, _ = _names(item)
    if not item.get_closest_marker("ray"):
        return file
    return "clusters" if file.startswith(("tests/cluster/", "tests/faults/")) else "local Rays"


def _names(item: pytest.Item) -> tuple[str, str]:
    """The file, and the test without its parameters."""
    file, _, test = item.nodeid.partition("::")
    return file, f"{file}::{test.partition('[')[0]}"
