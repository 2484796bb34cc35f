"""Probes about what another record of the same model edits: judged by that record's answer, not as spill."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from odedit.data.pool import normal
from odedit.inputs.batch import EditRequest, Probe, is_locality
from odedit.runtime.brief import brief

EDITED_PROBE = "edited_gen_"
"""Beginning of the names of probes whose answer another record has edited."""


@dataclass(frozen=True)
class Edited:
    """Everything that the records of one model edit.

    Attributes:
        facts: Edit id and new answer by `fact`.
        questions: Edit id and new answer by picture key and question, normalized by `odedit.data.pool.normal`.
    """

    facts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    questions: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    __repr__ = brief

    def within(self, edit_ids: Collection[str]) -> Edited:
        """What these records edit."""
        ids = frozenset(edit_ids)
        facts = {fact: edit for fact, edit in self.facts.items() if edit[0] in ids}
        return Edited(facts, {question: edit for question, edit in self.questions.items() if edit[0] in ids})

    def with_later(self, other: Edited) -> Edited:
        """What both edit; of one thing the other's answer."""
        return Edited({**self.facts, **other.facts}, {**self.questions, **other.questions})

    def answer_to(self, probe: Probe) -> tuple[str, str] | None:
        """Edit id and new answer of the record that edits what a probe asks; None if no record does."""
        found = None if probe.fact is None else self.facts.get(probe.fact)
        if found is None and probe.picture is not None:
            found = self.questions.get((probe.picture.key, normal(probe.prompt)))
        return found


def judged_by_edits(request: EditRequest, edited: Edited) -> EditRequest:
    """The request with `m_loc_near` as `edited_gen_mlocnear` where the model's records edit what that probe asks.

    The record's own question without its picture stays a locality probe, because nothing in it names the fact.
    """
    probes: dict[str, Probe] = {}
    for name, probe in request.probes.items():
        found = edited.answer_to(probe) if is_locality(name) else None
        if found is None or _is_blind(probe, request.edit):
            probes[name] = probe
        else:
            probes[EDITED_PROBE + name.replace("_", "")] = replace(probe, target=found[1])
    return replace(request, probes=probes)


def _is_blind(probe: Probe, edit: Probe) -> bool:
    return probe.picture is None and edit.picture is not None and normal(probe.prompt) == normal(edit.prompt)
