"""Why records were not edited: reasons of one kind are counted together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 3
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+")
"""What differs between records with the same fault: quoted names, paths and numbers."""


class Reasons:
    """Counts the reasons of failed and skipped rows by their kind."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes a result row that was not edited."""
        text = row["error"] or "no reason is given"
        bare = text.removeprefix(f"{row['file']}, record {row['index']}: ").replace(row["edit_id"], "")
        kind = (row["status"], _NAMES.sub("", bare))
        self._counts[kind] += 1
        self._first.setdefault(kind, text)

    def commonest(self) -> list[dict[str, Any]]:
        """The commonest kinds: status, number of rows, and the reason of the first of them."""
        return [
            {"status": kind[0], "count": count, "first": self._first[kind]}
            for kind, count in self._counts.most_common(SHOWN)
        ]


def sentences(reasons: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each kind of reason.

    >>> sentences([{"status": "skipped", "count": 12, "first": "a.json, record 0: image 'x' is not there."}])
    ["12 skipped, the first: a.json, record 0: image 'x' is not there."]
    """
    return [f"{one['count']} {one['status']}{', the first' * (one['count'] > 1)}: {one['first']}" for one in reasons]


def lines(reasons: Sequence[Mapping[str, Any]]) -> str:
    """The sentences on lines of their own."""
    return "\n".join(f"  {sentence}" for sentence in sentences(reasons))
