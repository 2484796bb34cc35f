"""The sum of finished single edits, which is what merging them into one checkpoint makes.

Edits that were optimised alone change each other's answers: it serves a few edits, and as a comparison.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from odedit.editors.base import Editor, Mergeable
from odedit.errors import InputError
from odedit.ways.base import Committed, Fit, PlainWay, Step, Task, WayConfig
from odedit.ways.common.stacked import edits_of


class Sum(PlainWay):
    """All edits added up."""

    Config: ClassVar[type] = WayConfig
    uses_edits: ClassVar[bool] = True
    defaults: ClassVar[dict[str, dict[str, str]]] = {"editor": {"name": "ftl"}, "objective": {"name": "native"}}

    def check(self, editor: Editor, name: str) -> None:
        if not isinstance(editor, Mergeable):
            raise InputError(
                f"editor.name: got {name!r}, but commit.way 'sum' adds weights up, and edits of {name} are none: it "
                "decides per prompt. Use ftl, ftv, lora or mend, or another way."
            )

    def commit(self, task: Task) -> Generator[Step, None, Committed]:
        yield Step(1, 1, doing="adding up")
        fits = {request.edit_id: Fit(0, "summed") for request in task.requests}
        return Committed(edits_of(task), fits)


WAY = Sum
