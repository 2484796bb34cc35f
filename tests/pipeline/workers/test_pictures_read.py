"""Pictures that neither the objective, nor the editor, nor a score reads are not encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from odedit.backbones.base import Backbone
from odedit.inputs.batch import EditRequest
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows as results
from pipeline.workers import editor as actor

Inline = Callable[[RunConfig], Outcome]

# Slots of supervision whose pictures are read, by editor and objective. Beside them the edit's and the probes'.
READ = {
    ("ftl", "native"): (),
    ("ftl", "rephrase"): ("text_rephrase", "image_rephrase"),
    ("ftl", "native_kl"): ("text_locality", "image_locality", "near_locality"),
    ("wise", "native"): ("text_locality", "image_locality", "near_locality"),
    ("ftl", "odedit"): ("text_rephrase", "image_rephrase", "text_locality", "image_locality", "near_locality"),
}


@pytest.mark.parametrize(("names", "slots"), READ.items(), ids=lambda value: "-".join(value))
def test_only_pictures_that_are_read_are_encoded(
    names: tuple[str, str],
    slots: tuple[str, ...],
    settings: dict[str, Any],
    inline: Inline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[set[str]] = []
    wanted: list[set[str]] = []
    reading, encode_requests = EditRequest.reading, actor.encode_requests

    def encode(backbone: Backbone, requests: Sequence[EditRequest], *arguments: Any) -> Any:
        encoded.append({picture.key for request in requests for picture in request.pictures()})
        return encode_requests(backbone, requests, *arguments)

    def noted(self: EditRequest, read: Collection[str]) -> EditRequest:
        probes = [self.edit, *self.probes.values()]
        probes += [probe for slot, probe in self.supervision.items() if slot in slots]
        wanted.append({probe.picture.key for probe in probes if probe.picture is not None})
        return reading(self, read)

    monkeypatch.setattr(actor, "encode_requests", encode)
    monkeypatch.setattr(EditRequest, "reading", noted)
    editor, objective = names
    changed = {"editor": {"name": editor}, "objective": {"name": objective}, "stopping": {"max_steps": 1}}
    outcome = inline(from_dict(settings | changed))
    assert outcome.summary["n"] > 1
    assert set().union(*encoded) == set().union(*wanted)


def test_an_edit_is_the_same_without_the_supervision_that_nothing_reads(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"editor": {"name": "ftl"}, "objective": {"name": "native"}, "stopping": {"max_steps": 5}}
    lean = inline(from_dict(settings | changed))
    monkeypatch.setattr(EditRequest, "reading", lambda self, slots: self)
    full = inline(from_dict(settings | changed | {"out": str(settings["out"]) + "-full"}))
    pairs = list(zip(*(results.read_rows(results.parts(run.workspace)) for run in (lean, full)), strict=True))
    assert len(pairs) > 1
    for one, other in pairs:
        assert one["edit_id"] == other["edit_id"] and one["steps"] == other["steps"]
        assert one["losses"]["rel"] == pytest.approx(other["losses"]["rel"], abs=1e-5)
        assert one["m_gen"] == other["m_gen"] and one["m_loc"] == other["m_loc"]
