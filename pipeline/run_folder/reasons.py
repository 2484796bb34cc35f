"""Counts of the reasons why records were not edited, ignoring names and numbers in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 3
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+")
"""Parts of a reason that differ between records with the same fault: quoted names, paths and numbers."""


class Reasons:
    """Counter of the reasons of failed and skipped rows, by kind."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts the reason of a failed or skipped row."""
        text = row["error"] or "no reason is given"
        bare = text.removeprefix(f"{row['file']}, record {row['index']}: ").replace(row["edit_id"], "")
        kind = (row["status"], _NAMES.sub("", bare))
        self._counts[kind] += 1
        self._first.setdefault(kind, text)

    def commonest(self, shown: int = SHOWN) -> list[dict[str, Any]]:
        """The commonest kinds, three by default: status, number of rows, and the reason of the first row."""
        return [
            {"status": kind[0], "count": count, "first": self._first[kind]}
            for kind, count in self._counts.most_common(shown)
        ]


def sentences(reasons: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per kind of reason.

    >>> sentences([{"status": "skipped", "count": 12, "first": "a.json, record 0: image 'x' is not there."}])
    ["12 skipped, the first: a.json, record 0: image 'x' is not there."]
    """
    return [
        f"{kind['count']} {kind['status']}{', the first' * (kind['count'] > 1)}: {kind['first']}" for kind in reasons
    ]


def lines(reasons: Sequence[Mapping[str, Any]]) -> str:
    """Text of `sentences`, indented, one per line."""
    return "\n".join(f"  {sentence}" for sentence in sentences(reasons))
