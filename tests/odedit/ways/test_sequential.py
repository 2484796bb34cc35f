"""Lifelong editing: what follows on what, resuming, streams, and the scores of earlier edits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odedit import Objective, ObjectiveConfig, Stopping, edit, editors, encode_requests, load_editor
from odedit.editors.tpatcher import _normal
from odedit.errors import InputError
from odedit.evaluation.scores import EvaluationConfig, evaluate_together
from odedit.storage.location import locate
from odedit.ways import sequential
from odedit.ways.base import Committed, Task
from odedit.ways.common.files import load_with_carried, save_committed
from odedit.ways.sequential import Sequential, SequentialConfig
from tests.support import lifelong
from tests.support.committing import finish
from tests.support.requests import TEMPLATE, make_pool, make_request
from tests.support.small_editors import ready_editor

OBJECTIVES = {
    "native": ObjectiveConfig(name="native"),
    "odedit": ObjectiveConfig(name="odedit", warmup=0.0, ramp=0.3, sigma2_0=50.0),
    "contrast": ObjectiveConfig(name="contrast", negatives=4, negatives_at_once=2),
}
NAMES = [name for name in editors.names() if name != "residual"]  # its vectors are written by `bulk`


def requests(count: int, first: int = 0):
    return [make_request(number) for number in range(first, first + count)]


def task(backbone, editor, count=3, objective="native", steps=3, objective_used=None, **more: Any) -> Task:
    config = OBJECTIVES[objective]
    values: dict[str, Any] = dict(
        backbone=backbone,
        template=TEMPLATE,
        editor=editor,
        objective=objective_used or Objective(config, 50.0),
        requests=requests(count),
        stopping=Stopping(steps, worst_token_nll=1e-6),
        negatives=make_pool(backbone, sites=editor.sites) if config.num_negatives else None,
    )
    return Task(**values | more)


def commit(work: Task, **settings: Any) -> Committed:
    return finish(Sequential(SequentialConfig(**settings)), work)[0]


def untimed(result: Committed) -> dict[str, list[dict[str, Any]]]:
    """The tables without seconds."""
    return {
        name: [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for name, rows in result.tables.items()
    }


def assert_same(one: Committed, other: Committed) -> None:
    for first, second in ((one.params, other.params), (one.carried, other.carried)):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
    assert (one.fits, one.curves, one.problems) == (other.fits, other.curves, other.problems)
    assert untimed(one) == untimed(other)


@pytest.fixture
def editor_of(backbone, tmp_path):
    return lambda name, **settings: ready_editor(name, backbone, tmp_path, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_of_one_is_the_single_edit(backbone, editor_of, name) -> None:
    editor = editor_of(name)
    work = task(backbone, editor, 1)
    result = commit(work)
    settings = work.objective.config
    read = work.requests[0].reading(settings.reads(editor))
    supervision, _ = encode_requests(backbone, [read], TEMPLATE, editor.sites)
    (single,) = edit(backbone, editor, work.objective, supervision, work.stopping, work.seed)
    _, evaluation = encode_requests(backbone, work.requests, TEMPLATE, editor.sites)
    prefix = backbone.prefix(evaluation, *editor.sites)
    with torch.no_grad():
        states = []
        for params in (result.params, single.params):
            with editor.together(backbone, params, evaluation):
                states.append(backbone.suffix(prefix))
        unedited = backbone.suffix(prefix)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    assert not torch.equal(states[0], unedited)
    (fit,) = result.fits.values()
    assert (fit.steps, fit.stop_reason, fit.worst_nll) == (
        single.steps, single.stop_reason, single.curves["worst_nll"][-1],
    )  # fmt: skip


@pytest.mark.parametrize(("name", "objective"), [(name, "native") for name in NAMES] + [
    ("ftl", "odedit"), ("lora", "contrast"), ("wise", "odedit"), ("tpatcher", "contrast"),
])  # fmt: skip
def test_an_interrupted_sequence_and_a_stream_end_as_the_whole(
    backbone, editor_of, monkeypatch, tmp_path: Path, name, objective
) -> None:
    settings = {"shard_edits": 2} if name == "wise" else {}
    work = task(backbone, editor_of(name, **settings), 4, objective)
    whole = commit(work, retention=(1, 2, 4))
    assert [row["position"] for row in whole.tables["sequence"]] == [1, 2, 3, 4]
    assert bool(whole.carried) == (objective == "odedit")

    monkeypatch.setattr(sequential, "_SAVE_EVERY_S", 0.0)
    state = locate(str(tmp_path / "state.safetensors"), "out")
    way = Sequential(SequentialConfig(retention=(1, 2, 4)))
    steps = way.commit(replace(work, state=state))
    for step in steps:
        if step.doing == "editing" and step.number == 3:
            break
    steps.close()
    assert_same(whole, finish(way, replace(work, state=state))[0])

    begun = commit(replace(work, requests=work.requests[:2]), retention=(1, 2, 4))
    file = locate(str(tmp_path / "committed.safetensors"), "out")
    fits = {edit_id: vars(fit) for edit_id, fit in begun.fits.items()}
    info = _info(work, begun, {"fits": fits, "tables": begun.tables})
    save_committed(file, begun.params, info, begun.carried)
    params, info, carried = load_with_carried(file)
    stream = replace(work, start=params, start_ids=info.edit_ids, start_details=info.details, carried=carried)
    assert_same(whole, commit(stream, retention=(1, 2, 4)))


def _info(work: Task, made: Committed, details: dict[str, Any]):
    from odedit.ways.base import CommittedInfo

    ids = tuple(request.edit_id for request in work.requests if request.edit_id in made.fits)
    return CommittedInfo("sequential", {}, "", {}, "blip2", "embedded", "", "float32", "mmedit", ids, details)


def test_fine_tuning_goes_on_like_plain_pytorch(backbone, editor_of) -> None:
    """FT-L: the library's modules under torch.optim.AdamW, a new optimiser for every record."""
    from tests.support.transformers_forward import copy_of, library_nll

    editor = editor_of("ftl")
    work = task(backbone, editor, 4, steps=4)
    result = commit(work)
    model = copy_of(backbone)
    layer = model.language_model.model.decoder.layers[-1]
    weights = [layer.fc1.weight, layer.fc2.weight]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    supervision, _ = encode_requests(backbone, work.requests, TEMPLATE, editor.sites)
    for number, request in enumerate(work.requests):
        optimizer = torch.optim.AdamW(weights, lr=editor.config.learning_rate, weight_decay=0.0)
        for _ in range(4):
            optimizer.zero_grad()
            library_nll(model, backbone, supervision, request, number).backward()
            optimizer.step()
    for site, weight, old in zip(("layers.-1.ffn.in", "layers.-1.ffn.out"), weights, before, strict=True):
        difference = (weight - old).detach()
        moved = result.params[site][0]
        # Adam divides by the root of the gradient's square: entries with hardly any gradient differ by rounding.
        assert float((moved - difference).abs().mean()) < 1e-3 * float(difference.abs().mean())


def test_earlier_edits_are_scored_again_as_by_hand(backbone, editor_of) -> None:
    work = task(backbone, editor_of("ftl"), 4)
    result = commit(work, retention=(1, 3))
    rows = result.tables["retention"]
    assert [(row["edits"], row["position"]) for row in rows] == [(1, 1), (3, 1), (3, 2), (3, 3)]
    first_three = commit(replace(work, requests=work.requests[:3]))
    _, evaluation = encode_requests(backbone, work.requests[:3], TEMPLATE)
    config = EvaluationConfig(generate=False, mmedit=False)
    by_hand = evaluate_together(backbone, work.editor, first_three.params, evaluation, config)
    for row, scores in zip(rows[1:], by_hand, strict=True):
        assert all(row[name] == scores[name] for name in ("rel", "t_gen", "m_gen", "t_loc", "m_loc", "m_loc_near"))
    assert result.curves["step"] == [1.0, 3.0]
    assert result.curves["retention_rel"][1] == pytest.approx(sum(row["rel"] for row in by_hand) / 3)


def test_locality_against_the_model_before_an_edit(backbone, editor_of) -> None:
    """An edit that does nothing has changed the unedited model's answers no more than those before it."""
    work = task(backbone, editor_of("ftl", learning_rate=0.02), 3, steps=15)
    last = commit(work).tables["sequence"][-1]
    idle = commit(replace(work, stopping=Stopping(15, worst_token_nll=100.0)))
    assert all(row["t_loc_step"] == row["m_loc_step"] == 1.0 for row in idle.tables["sequence"])
    assert last["t_loc_step"] >= last["t_loc"]
    assert {"m_loc_near_step", "m_loc_step"} <= last.keys() and "rel_step" not in last


def test_the_multiplier_is_kept_or_reset(backbone, editor_of) -> None:
    work = task(backbone, editor_of("ftl"), 3, "odedit")
    kept, reset = (commit(work, multiplier=multiplier) for multiplier in ("kept", "reset"))
    last = commit(replace(work, requests=work.requests[-1:]))
    assert kept.carried.keys() == reset.carried.keys() == last.carried.keys()
    assert any(not torch.equal(value, reset.carried[name]) for name, value in kept.carried.items())
    assert all(len(value) == 1 and not value.requires_grad for value in kept.carried.values())


def test_what_cannot_be_edited_is_named_and_the_others_follow(backbone, editor_of) -> None:
    long = make_request(9)
    long = replace(long, edit=replace(long.edit, prompt="why? " * 2000))
    work = task(backbone, editor_of("ftl"), own := 3)
    mixed = commit(replace(work, requests=[work.requests[0], long, *work.requests[1:]]))
    assert set(mixed.problems) == {"edit-9"} and len(mixed.fits) == own
    plain = commit(work)
    assert all(torch.equal(value, plain.params[name]) for name, value in mixed.params.items())
    with pytest.raises(InputError, match="data.path: no record can be edited; first: "):
        commit(replace(work, requests=[long]))
    exploding = task(backbone, editor_of("ftl", learning_rate=1e30), 2)
    with pytest.raises(InputError, match="the objective is not finite"):
        commit(exploding)


def test_editors_without_a_sequence_are_refused() -> None:
    with pytest.raises(InputError, match=r"editor.name: got 'plain', whose edits cannot follow one another"):
        Sequential(SequentialConfig()).check(object(), "plain")
    with pytest.raises(ValueError, match="retention: got "):
        SequentialConfig(retention=(0,))


def test_ten_edits_of_wise_are_those_of_a_plain_implementation(backbone) -> None:
    """Shards of three under masks of their own, two merged to a memory, and a last shard that is not full."""
    settings = {"site": "layers.2.ffn.in", "shard_edits": 3, "memory_shards": 2, "clamp": 0.05, "learning_rate": 0.3}
    editor = load_editor("wise", settings)
    alone = Objective(ObjectiveConfig(name="native", own_weight=0.0))
    work = task(backbone, editor, 10, steps=2, objective_used=alone)
    result = commit(work)
    batch, _ = encode_requests(backbone, [r.reading(("edit",)) for r in work.requests], TEMPLATE)
    expected = lifelong.wise(backbone, batch, work.requests, editor.config, 2)
    assert result.params["side_edits"].tolist() == [count for *_, count in expected] == [6, 3, 1]
    for row, (delta, threshold, _) in enumerate(expected):
        torch.testing.assert_close(result.params["side_live"][row], delta.flatten(), rtol=0, atol=1e-5)
        assert float(result.params["threshold"][row]) == pytest.approx(threshold, rel=1e-3)
        assert float(delta.abs().max()) > 1e-3
    share = float((result.params["side_live"] != 0).float().mean(1)[0])
    assert 0.1 < share < 0.4, "the merged memory has entries of both masks"


def test_ten_edits_of_tpatcher_are_those_of_a_plain_implementation(backbone) -> None:
    """Neurons grow, earlier ones do not move, and their states are memory states of later edits."""
    pool, _ = encode_requests(backbone, requests(2, first=20), TEMPLATE)
    editor = load_editor("tpatcher", {"memory_states": 12, "memory_top": 7, "max_neurons": 3})
    editor = editor.measured(backbone, pool)
    work = task(backbone, editor, 10, steps=3)
    result = commit(work)
    batch, _ = encode_requests(backbone, work.requests, TEMPLATE)
    memory, draws = editor._memory_states_MD, [_normal((3, backbone.hidden_size), 0, each) for each in batch.edit_ids]
    expected = lifelong.tpatcher(backbone, batch, memory, editor.config, 3, draws)
    assert result.params["k"].shape[1] == len(expected["k"]) >= 10
    for name, value in expected.items():
        torch.testing.assert_close(result.params[name][0], value, rtol=1e-5, atol=1e-5)
