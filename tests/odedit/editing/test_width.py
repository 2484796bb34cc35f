"""Number of edits that move together: bounded by the memory of the native loss, and with the same results."""

from __future__ import annotations

import weakref

import pytest

from odedit import Objective, ObjectiveConfig, Stopping, calibrate, edit, encode_requests
from odedit.editing import loop, width
from odedit.runtime.peak_memory import peak_memory
from tests.support.limits import set_limits
from tests.support.requests import TEMPLATE
from tests.support.small_editors import ready_editor


@pytest.fixture(scope="module")
def objectives(backbone, requests_8):
    sigma2_0 = calibrate(backbone, requests_8, TEMPLATE)
    return {name: Objective(ObjectiveConfig(name=name, warmup=0.0), sigma2_0) for name in ("native", "odedit")}


@pytest.fixture
def no_slack(monkeypatch):
    """A small model is treated like one whose memory matters."""
    set_limits(monkeypatch, slack_values=0, slack_head_values=0, busy_flops=0)


# Without T-Patcher and UniKE: on so small a model their native loss needs less than one edit under ODEdit.
@pytest.mark.parametrize("name", ["wise", "mend", "ftl", "ftv", "lora"])
def test_odedit_takes_hardly_more_memory_than_its_base_editor(
    backbone, requests_8, objectives, no_slack, tmp_path, name
):
    editor = ready_editor(name, backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE, editor.sites)
    peaks = {}
    for key, objective in objectives.items():
        with peak_memory("cpu") as peak:
            edit(backbone, editor, objective, supervision, Stopping(3, 1e-9))
        peaks[key] = peak.bytes
    weights = sum(value.numel() * value.element_size() for value in backbone.model.parameters())
    assert weights + peaks["odedit"] <= 1.05 * (weights + peaks["native"])


def test_the_width_is_that_of_as_many_sequences(backbone, requests_8, objectives, no_slack, tmp_path):
    editor = ready_editor("lora", backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE, editor.sites)
    prefix = backbone.prefix(supervision, *editor.sites)
    widths = {
        name: width.width_like_native(backbone, editor, objective, supervision, prefix)
        for name, objective in objectives.items()
    }
    # Eight edits of one sequence each; ODEdit reads six per edit.
    assert widths == {"native": 8, "odedit": 1}


def test_edits_with_small_steps_move_together(backbone, requests_8, objectives, tmp_path):
    editor = ready_editor("ftl", backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE)
    prefix = backbone.prefix(supervision, *editor.sites)
    assert width.width_like_native(backbone, editor, objectives["odedit"], supervision, prefix) == 8


@pytest.mark.parametrize("name", ["wise", "mend"])
def test_edits_that_move_in_turn_are_those_that_move_together(
    backbone, requests_8, objectives, monkeypatch, tmp_path, name
):
    editor = ready_editor(name, backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE)
    runs = []
    for at_once in (8, 3):
        monkeypatch.setattr("odedit.editing.loop.width_like_native", lambda *_, at_once=at_once: at_once)
        runs.append(edit(backbone, editor, objectives["odedit"], supervision, Stopping(4, 1e-9)))
    for first, second in zip(*runs, strict=True):
        assert (first.edit_id, first.steps, first.stop_reason) == (second.edit_id, second.steps, second.stop_reason)
        for key, value in first.params.items():
            assert (value - second.params[key]).norm() <= 1e-3 * value.norm()
        for term, curve in first.curves.items():
            assert curve == pytest.approx(second.curves[term], rel=2e-3, abs=1e-4), term


@pytest.mark.parametrize("name", ["unike", "lora"])
def test_nothing_of_the_last_step_is_held_while_other_edits_enter(
    backbone, requests_8, objectives, monkeypatch, tmp_path, name
):
    """Activations saved for backward are freed with the states that a forward returned."""
    editor = ready_editor(name, backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE, editor.sites)
    monkeypatch.setattr("odedit.editing.loop.width_like_native", lambda *_: 3)
    returned, alive = [], []
    suffix, admit = backbone.suffix, loop._Run._admit

    def watched(*arguments):
        states = suffix(*arguments)
        returned.append(weakref.ref(states))
        return states

    def admitting(run):
        alive.append(sum(states() is not None for states in returned))
        admit(run)

    monkeypatch.setattr(backbone, "suffix", watched)
    monkeypatch.setattr(loop._Run, "_admit", admitting)
    edit(backbone, editor, objectives["odedit"], supervision, Stopping(2, 1e-9))
    assert len(alive) == 4 and not any(alive)
