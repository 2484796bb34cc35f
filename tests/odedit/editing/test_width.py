"""How many edits move together: by the memory that the base editor's own loss would take, and with the same outcome."""

from __future__ import annotations

import weakref

import pytest

from odedit import Objective, ObjectiveConfig, Stopping, calibrate, edit, encode_requests
from odedit.editing import loop
from odedit.editing import width as widths
from odedit.runtime.peak_memory import peak_memory
from tests.support.limits import set_limits
from tests.support.requests import TEMPLATE
from tests.support.small_editors import ready_editor


@pytest.fixture(scope="module")
def objectives(backbone, requests_8):
    sigma2_0 = calibrate(backbone, requests_8, TEMPLATE)
    return {name: Objective(ObjectiveConfig(name=name, warmup=0.0), sigma2_0) for name in ("native", "odedit")}


@pytest.fixture
def no_leeway(monkeypatch):
    """As on a model that is large enough for all of it to matter."""
    set_limits(monkeypatch, slack_values=0, slack_head_values=0, busy_flops=0)


# Not T-Patcher and UniKE, which take so little of so small a model that even one edit at a time takes more.
@pytest.mark.parametrize("name", ["wise", "mend", "ftl", "ftv", "lora"])
def test_odedit_takes_hardly_more_memory_than_its_base_editor(
    backbone, requests_8, objectives, no_leeway, tmp_path, name
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


def test_the_width_is_that_of_as_many_sequences(backbone, requests_8, objectives, no_leeway, tmp_path):
    editor = ready_editor("lora", backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE, editor.sites)
    prefix = backbone.prefix(supervision, *editor.sites)
    found = {
        name: widths.width_like_native(backbone, editor, objective, supervision, prefix)
        for name, objective in objectives.items()
    }
    # Eight edits of one sequence, or of six.
    assert found == {"native": 8, "odedit": 1}


def test_what_takes_little_moves_together(backbone, requests_8, objectives, tmp_path):
    editor = ready_editor("ftl", backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE)
    prefix = backbone.prefix(supervision, *editor.sites)
    assert widths.width_like_native(backbone, editor, objectives["odedit"], supervision, prefix) == 8


@pytest.mark.parametrize("name", ["wise", "mend"])
def test_edits_that_move_in_turn_are_those_that_move_together(
    backbone, requests_8, objectives, monkeypatch, tmp_path, name
):
    editor = ready_editor(name, backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE)
    runs = []
    for width in (8, 3):
        monkeypatch.setattr("odedit.editing.loop.width_like_native", lambda *_, width=width: width)
        runs.append(edit(backbone, editor, objectives["odedit"], supervision, Stopping(4, 1e-9)))
    for one, other in zip(*runs, strict=True):
        assert (one.edit_id, one.steps, one.stop_reason) == (other.edit_id, other.steps, other.stop_reason)
        assert all((one.params[key] - other.params[key]).norm() <= 1e-3 * one.params[key].norm() for key in one.params)
        for term, curve in one.curves.items():
            assert curve == pytest.approx(other.curves[term], rel=2e-3, abs=1e-4), term


@pytest.mark.parametrize("name", ["unike", "lora"])
def test_nothing_of_the_last_step_is_held_while_other_edits_enter(
    backbone, requests_8, objectives, monkeypatch, tmp_path, name
):
    """What a forward keeps for its gradient hangs on what it has shown."""
    editor = ready_editor(name, backbone, tmp_path)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE, editor.sites)
    monkeypatch.setattr("odedit.editing.loop.width_like_native", lambda *_: 3)
    shown, alive = [], []
    suffix, admit = backbone.suffix, loop._Run._admit

    def watched(*arguments):
        states = suffix(*arguments)
        shown.append(weakref.ref(states))
        return states

    def admitting(run):
        alive.append(sum(states() is not None for states in shown))
        admit(run)

    monkeypatch.setattr(backbone, "suffix", watched)
    monkeypatch.setattr(loop._Run, "_admit", admitting)
    edit(backbone, editor, objectives["odedit"], supervision, Stopping(2, 1e-9))
    assert len(alive) == 4 and not any(alive)
