"""Joint training: what it reads, that it learns and keeps, that it resumes, and workers that share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed

from odedit import editors, load_backbone, objectives
from odedit.backbones import encode_requests
from odedit.data.images import ImageReader
from odedit.data.records import read_records
from odedit.data.supervision import Supervision, build_request
from odedit.errors import InputError
from odedit.evaluation.scores import evaluate_together
from odedit.inputs.batch import LOCALITY_SLOTS
from odedit.storage.location import locate
from odedit.ways.base import Committed, Task
from odedit.ways.common import examples as examples_module
from odedit.ways.common.examples import Examples, Reading, read
from odedit.ways.common.sequences import Features, own_answers, with_answer
from odedit.ways.joint import Joint, JointConfig
from tests.support.requests import TEMPLATE, make_request
from tests.support.workers import two_workers

EDITOR = dict(Joint.defaults["editor"])
QUICK = JointConfig(steps=12, records=4, kept=4, copies=1, candidates=4, check_every=4)


def requests(count: int, first: int = 0):
    return [make_request(number) for number in range(first, first + count)]


def task(backbone, *, objective="contrast", count=4, state=None, editor=EDITOR, own=None):
    settings = dict(editor)
    config = objectives.ObjectiveConfig(objective)
    return Task(
        backbone=backbone,
        template=TEMPLATE,
        editor=editors.load_editor(settings.pop("name"), settings),
        objective=objectives.Objective(config, 1.0),
        requests=requests(count) if own is None else own,
        pool=requests(6, first=20),
        state=state,
    )


def of_the_world(paths, split: str, count: int):
    """Requests of the embedded benchmark, each about another fact."""
    reader = ImageReader(str(paths["images"]), str(paths["images_rephrase"]))
    records = {record.fields["fact"]: record for record in read_records(str(paths[split]))}
    chosen = list(records.values())[:count]
    return [build_request(record, reader, Supervision(near_locality=False), locality=False) for record in chosen]


def finished(steps) -> Committed:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def examples_of(backbone, **kwargs) -> Examples:
    return list(read(backbone, TEMPLATE, (), requests(3), requests(6, first=20), Reading(2, 8, 0), **kwargs))[-1]


def test_own_answers_are_those_of_one_by_one_generation(backbone) -> None:
    features = Features(backbone)
    probes = [request.edit for request in requests(5)]
    features.add([probe.picture for probe in probes])
    sequences = [backbone.sequence(probe, TEMPLATE) for probe in probes]
    for sequence, (answer, states_TD) in zip(sequences, own_answers(features, sequences), strict=True):
        expected: list[int] = []
        while len(expected) < len(answer):
            batch = features.row([with_answer(sequence, [*expected, 0])])
            prefix = backbone.prefix(batch, "layers.0.attention.q")
            states = backbone.suffix(prefix, batch.predict_EKT)
            expected.append(int(backbone.head(states[0, 0, len(expected)]).argmax()))
        assert answer == expected and answer
        assert answer[-1] in backbone.ends or len(answer) == len(sequence.tokens) - sequence.first_target + 8
        batch = features.row([with_answer(sequence, answer)])
        states = backbone.suffix(backbone.prefix(batch, "layers.0.attention.q"), batch.predict_EKT)[0, 0]
        torch.testing.assert_close(states_TD, states)


def test_examples_end_their_answers_and_ask_about_other_pictures(backbone) -> None:
    examples = examples_of(backbone)
    (end,) = {sequence.tokens[-1] for record in examples.records for sequence in record.wordings}
    assert end in backbone.ends
    for record in examples.records:
        assert len(record.own) == len(record.other) == 3  # the picture and two copies
        assert record.negatives and len(record.negatives) == len(record.nearness)
        assert not {sequence.picture for sequence in record.negatives} & {*record.own, *record.other}
        question = record.wordings[0]
        pictured = [sequence for sequence in record.negatives if sequence.picture]
        assert all(
            sequence.tokens[: sequence.first_target] == question.tokens[: question.first_target]
            for sequence in pictured
        )
        assert set(record.supervision) == set(LOCALITY_SLOTS)


def test_a_picture_with_the_replaced_answer_shows_the_same_thing(backbone) -> None:
    """The pool holds the record's own picture under another name: it is a positive and no negative."""
    twin = make_request(20)
    picture = replace(make_request(0).edit.picture, key="twin")
    twin = replace(twin, edit=replace(twin.edit, picture=picture))
    pool = [twin, *requests(7, first=21)]
    examples = list(read(backbone, TEMPLATE, (), requests(1), pool, Reading(0, 16, 0)))[-1]
    (record,) = examples.records
    assert "twin" in record.same
    assert "twin" not in {sequence.picture for sequence in record.negatives}


def test_a_picture_that_another_record_edits_is_not_of_the_same_thing(backbone) -> None:
    """One question for all, and the records' own pictures as the pool: no picture is trained with another's answer."""
    first = make_request(0)
    key = "0" * 32
    other = replace(
        make_request(2), edit=replace(first.edit, target="ruby", picture=replace(first.edit.picture, key=key))
    )
    shown = [replace(key_of, edit=replace(first.edit, picture=key_of.edit.picture)) for key_of in (first, other)]
    augmented = replace(other.edit, picture=replace(other.edit.picture, key=f"{key}-{'1' * 16}"))
    pool = [*shown, replace(other, edit=augmented), *requests(5, first=21)]
    examples = list(read(backbone, TEMPLATE, (), [first, other], pool, Reading(0, 16, 0)))[-1]
    mine, theirs = examples.records
    assert not {key, augmented.picture.key} & set(mine.same)
    assert augmented.picture.key not in {sequence.picture for sequence in theirs.negatives}


def test_an_altered_copy_is_not_of_the_same_thing_where_another_record_replaces_the_same_answer(backbone) -> None:
    """One question for two records, and their pictures as the pool: only the record's own copies can be positives."""
    first, second = requests(1, first=4)[0], requests(1, first=6)[0]
    picture = replace(first.edit.picture, key="0" * 32)
    second = replace(second, edit=replace(first.edit, target="ruby", picture=picture))
    pool = [*(replace(request, supervision={}, probes={}) for request in (first, second)), *requests(5, first=21)]
    examples = list(read(backbone, TEMPLATE, (), [first, second], pool, Reading(0, 256, 0, pool_copies=8)))[-1]
    for record, other in zip(examples.records, (second, first), strict=True):
        assert any(key.startswith(f"{record.own[0]}-altered-") for key in record.same)
        assert not any(key.startswith(other.edit.picture.key) for key in record.same)


def test_an_altered_copy_may_be_of_the_same_thing_where_another_answer_is_replaced(backbone) -> None:
    own = requests(12)
    pool = [replace(request, supervision={}, probes={}) for request in own]
    examples = list(read(backbone, TEMPLATE, (), own, pool, Reading(0, 256, 0, pool_copies=4)))[-1]
    assert any(not key.startswith(record.own[0]) for record in examples.records for key in record.same)


def test_known_states_are_those_that_a_step_computes(backbone, monkeypatch) -> None:
    reading = Reading(1, 8, 0, pool_copies=1)
    examples = list(read(backbone, TEMPLATE, (), requests(3), requests(6, first=20), reading))[-1]
    asked = [*examples.kept, *(sequence for record in examples.records for sequence in record.negatives), None]
    batch = examples.features.row(asked)
    known = examples.unedited.at(asked, batch.predict_EKT.shape[-1])
    computed = backbone.suffix(backbone.prefix(batch, "layers.0.attention.q"), batch.predict_EKT)[0]
    assert known is not None and not known[-1].any()
    torch.testing.assert_close(known, computed * batch.target_mask_EKT[0].unsqueeze(-1))
    assert examples.unedited.at([with_answer(asked[0], [1, 2, 3])], 3) is None
    monkeypatch.setattr(examples_module, "_KNOWN_BYTES", 0)
    without = finished(Joint(QUICK).commit(task(backbone)))
    monkeypatch.undo()
    for name, value in finished(Joint(QUICK).commit(task(backbone))).params.items():
        # Adam amplifies rounding where a gradient is almost zero: the mean difference is small, not every one.
        assert float((value - without.params[name]).abs().mean()) < 1e-3 * float(value.abs().mean()), name


def test_altered_copies_of_the_pool_are_kept_and_asked_about(backbone) -> None:
    plain, more = (
        list(read(backbone, TEMPLATE, (), requests(2), requests(6, first=20), Reading(0, 64, 0, copies)))[-1]
        for copies in (0, 2)
    )
    own = {sequence.picture for sequence in plain.kept if sequence.picture}
    copies = {sequence.picture for sequence in more.kept if sequence.picture} - own
    assert copies and all("altered" in key for key in copies)
    assert {(tuple(s.tokens), s.picture) for s in plain.kept} < {(tuple(s.tokens), s.picture) for s in more.kept}
    for before, after in zip(plain.records, more.records, strict=True):
        added = {sequence.picture for sequence in after.negatives} - {sequence.picture for sequence in before.negatives}
        assert added and added <= set(more.features.by_key)


def test_joint_training_learns_the_records_and_keeps_the_pool(backbone, worlds) -> None:
    config = JointConfig(steps=60, records=4, kept=8, copies=1, candidates=8)
    own, pool = (of_the_world(worlds[0], split, count) for split, count in (("validation", 3), ("train", 12)))
    work = replace(task(backbone, own=own), pool=pool)
    result = finished(Joint(config).commit(work))
    _, evaluation = encode_requests(backbone, work.requests, TEMPLATE, work.editor.sites)
    rows = evaluate_together(backbone, work.editor, result.params, evaluation)
    assert [row["rel_generated_exact"] for row in rows] == [1.0] * 3
    assert {(fit.stop_reason, fit.steps) for fit in result.fits.values()} == {("max_steps", 60)}
    assert result.curves["worst_nll"][-1] == max(fit.worst_nll for fit in result.fits.values())
    _, kept = encode_requests(backbone, work.pool, TEMPLATE, work.editor.sites)
    rows = evaluate_together(backbone, work.editor, result.params, kept.select(("rel", "t_loc")))
    assert sum(row["t_loc"] for row in rows) / len(rows) > 0.9


def test_training_stops_when_every_record_was_learned_for_some_checks(backbone, worlds) -> None:
    config = JointConfig(steps=200, records=4, kept_weight=0, copies=0, candidates=4, check_every=5, stop=1, patience=2)
    own = of_the_world(worlds[0], "validation", 3)
    result = finished(Joint(config).commit(task(backbone, objective="native", own=own)))
    steps, worst = result.curves["step"], result.curves["worst_nll"]
    assert steps[-1] < 200 and {fit.stop_reason for fit in result.fits.values()} == {"worst_token_nll"}
    assert worst[-2] <= 1 and worst[-1] <= 1 and not (worst[-3] <= 1 and worst[-2] <= 1)


@pytest.mark.parametrize("objective", ["native", "native_kl", "odedit", "contrast"])
def test_every_objective_trains_and_a_resumed_training_equals_an_uninterrupted_one(
    backbone, tmp_path: Path, objective: str
) -> None:
    whole = finished(Joint(QUICK).commit(task(backbone, objective=objective)))
    state = locate(str(tmp_path / "state.safetensors"), "out")
    steps = Joint(QUICK).commit(task(backbone, objective=objective, state=state))
    for step in steps:
        if step.doing == "training" and step.number == 6:  # the state is that of the check at step 4
            break
    steps.close()
    resumed = finished(Joint(QUICK).commit(task(backbone, objective=objective, state=state)))
    assert whole.params.keys() == resumed.params.keys()
    for name, value in whole.params.items():
        assert torch.equal(value, resumed.params[name]), name
        assert name.endswith("lora_A") or bool(value.any())
    assert whole.fits == resumed.fits and whole.curves == resumed.curves


def test_full_weights_train_too(backbone) -> None:
    editor = {"name": "ftl", "sites": ["layers.*.ffn.in", "layers.*.ffn.out"], "learning_rate": 2e-3}
    result = finished(Joint(QUICK).commit(task(backbone, editor=editor)))
    assert len(result.params) == 2 * backbone.num_layers
    assert result.curves["worst_nll"][-1] < result.curves["worst_nll"][0]


def test_a_record_that_the_model_does_not_take_is_named_and_the_others_are_trained(backbone) -> None:
    long = make_request(9)
    long = replace(long, edit=replace(long.edit, prompt="why? " * 2000))
    result = finished(Joint(QUICK).commit(task(backbone, own=[*requests(2), long])))
    assert set(result.fits) == {"edit-0", "edit-1"}
    assert "positions" in result.problems["edit-9"] or "takes fewer" in result.problems["edit-9"]


def test_an_editor_that_is_no_difference_of_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"editor.name: got 'wise', but commit.way 'joint' trains one difference"):
        Joint(JointConfig()).check(editors.load_editor("wise"), "wise")


def _share(rank: int, size: int, address: str, results) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    backbone = load_backbone("blip2", "embedded")
    work = task(backbone, own=requests(4)[rank::size])
    result = finished(Joint(QUICK).commit(work))
    results.put((rank, {name: value.numpy() for name, value in result.params.items()}, sorted(result.fits)))
    distributed.destroy_process_group()


def test_two_workers_end_with_the_same_parameters_and_share_the_records(tmp_path: Path) -> None:
    (_, first, own), (_, second, other) = two_workers(_share, tmp_path)
    assert own == ["edit-0", "edit-2"] and other == ["edit-1", "edit-3"]
    for name, value in first.items():
        assert (value == second[name]).all(), name
