"""The way `routed`: its model against single edits, and the router against its own definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from odedit import EvaluationConfig, InputError, encode_requests, evaluate, load_backbone, load_editor
from odedit.editors.common.fine_tuning import resolve
from odedit.ways.common import router
from odedit.ways.common.adapters import CHOICE, adapters_of, take, without
from odedit.ways.common.prompt_states import KEY_SLOTS, prompt_states, states_of_edits
from odedit.ways.routed import Routed, RoutedConfig
from tests.support import tiny_current, tiny_models
from tests.support.committing import Whole, finish, requests_of, task_of
from tests.support.requests import TEMPLATE, make_request

WAY = Routed(RoutedConfig(steps=60, batch_size=24, negatives=3))
SITES = ("layers.25%.ffn.in", "layers.25%.ffn.out", "layers.>25%.attention.q", "layers.>25%.attention.v")
KEY = WAY.config.key


@pytest.fixture(scope="module")
def editor():
    return load_editor("lora", {"rank": 4, "sites": SITES, "learning_rate": 2e-3})


@pytest.fixture(scope="module")
def task(backbone, worlds, editor):
    return task_of(backbone, editor, requests_of(worlds[0], "validation", 5), requests_of(worlds[0], "train", 32))


@pytest.fixture(scope="module")
def committed(task):
    return finish(WAY, task)


@pytest.fixture(scope="module")
def evaluation(task, editor):
    return encode_requests(task.backbone, task.requests, TEMPLATE, WAY.serving(editor).sites)[1]


def states(backbone, serving, params, batch):
    """Final states of all positions with the model as committed, and the chosen edit of every sequence."""
    prefix = backbone.prefix(batch, *serving.sites, positionwise=serving.positionwise)
    with serving.together(backbone, params, batch) as trace:
        return backbone.suffix(prefix), trace.values[CHOICE].reshape(batch.present_EK.shape)


def unedited(backbone, serving, batch):
    return backbone.suffix(backbone.prefix(batch, *serving.sites, positionwise=serving.positionwise))


def test_an_edit_of_a_model_of_three_billion_takes_less_than_100_kilobytes(backbone, task):
    settings = dict(Routed.defaults["editor"])
    editor = load_editor(settings.pop("name"), settings)
    batch, _ = encode_requests(backbone, task.requests[:1], TEMPLATE)
    rank, shapes = editor.config.rank, [backbone.site(name).weight.shape for name in editor.config.sites]
    assert sum(value.numel() for value in editor.init(backbone, batch).values()) == sum(rank * sum(s) for s in shapes)
    hidden, inner = 2560, 10240  # of OPT-2.7B
    keys = len(KEY_SLOTS) * WAY.config.width * torch.float32.itemsize
    assert len(shapes) * rank * (hidden + inner) * torch.float16.itemsize + keys < 100_000


def test_sites_fit_any_depth(backbone):
    assert resolve(backbone, SITES) == [
        *(f"layers.1.ffn.{part}" for part in ("in", "out")),
        *(f"layers.{layer}.attention.{part}" for part in "qv" for layer in (2, 3)),
    ]
    assert backbone.site("layers.25%.ffn.in") is backbone.site("layers.1.ffn.in")
    with pytest.raises(InputError, match=r"layers.999%.ffn.in"):
        backbone.site("layers.999%.ffn.in")


def test_a_chosen_edit_changes_a_sequence_as_it_does_alone(task, editor, committed, evaluation, monkeypatch):
    backbone, serving, params = task.backbone, WAY.serving(editor), committed[0].params
    check_chosen(monkeypatch, backbone, editor, serving, params, adapters_of(params), evaluation, 5, 1e-5)


def check_chosen(monkeypatch, backbone, editor, serving, params, adapters, batch, count, tolerance):
    """Gives every sequence one of `count` edits or none, and compares its states with those of the edit alone."""
    edit_EK = torch.arange(batch.present_EK.numel()).reshape(batch.present_EK.shape) % (count + 1) - 1  # -1: none
    monkeypatch.setattr("odedit.ways.common.adapters.choose", lambda params, states: edit_EK.flatten())
    got, _ = states(backbone, serving, params, batch)
    plain = unedited(backbone, serving, batch)
    assert torch.equal(got[edit_EK == -1], plain[edit_EK == -1])
    for number in range(count):
        for_all = {name: value[[number] * batch.num_edits] for name, value in adapters.items()}
        with torch.no_grad(), editor.applied(backbone, for_all, batch):
            alone = backbone.suffix(backbone.prefix(batch, *serving.sites))
        torch.testing.assert_close(got[edit_EK == number], alone[edit_EK == number], atol=tolerance, rtol=tolerance)
        assert not torch.allclose(got[edit_EK == number], plain[edit_EK == number], atol=1e-3)


def check_random_edits(monkeypatch, model, sites):
    editor = load_editor("lora", {"rank": 4, "sites": sites})
    serving = WAY.serving(editor)
    serving.check(model)
    requests = [make_request(number) for number in range(3)]
    _, batch = encode_requests(model, requests, TEMPLATE, serving.sites)
    torch.manual_seed(0)
    params = {name: torch.randn_like(value) / 4 for name, value in editor.init(model, batch).items()}
    check_chosen(monkeypatch, model, editor, serving, params, params, batch, 3, 1e-4)


def test_a_chosen_edit_changes_a_fused_matrix_as_it_does_alone(tmp_path, monkeypatch):
    """The key reads the input of one matrix for gate and input, and one for queries, keys and values is edited."""
    model = load_backbone("auto", str(tiny_current.write("llava_phi3", tmp_path)))
    sites = ("layers.25%.ffn.gate_in", "layers.25%.ffn.out", "layers.>25%.attention.qkv")
    check_random_edits(monkeypatch, model, sites)


@pytest.mark.parametrize("parts", [("gate",), ("gate", "in", "out")])
def test_a_chosen_edit_changes_the_gate_of_the_keys_layer_as_it_does_alone(tmp_path, monkeypatch, parts):
    """The gate runs before the matrix whose input the router reads."""
    model = load_backbone("llava", str(tiny_models.write("llava", tmp_path)))
    check_random_edits(monkeypatch, model, [f"layers.25%.ffn.{part}" for part in parts])


def test_a_model_in_which_nothing_fires_is_the_unedited_one(task, editor, committed, evaluation):
    serving = WAY.serving(editor)
    deaf = committed[0].params | {router.THRESHOLDS: torch.full((5,), 2.0)}
    got, choice_EK = states(task.backbone, serving, deaf, evaluation)
    assert (choice_EK == router.NOTHING).all()
    assert torch.equal(got, unedited(task.backbone, serving, evaluation))


def test_the_edits_hold_and_other_answers_stay(task, editor, committed, evaluation):
    serving, params = WAY.serving(editor), committed[0].params
    _, choice_EK = states(task.backbone, serving, params, evaluation)
    assert choice_EK[:, evaluation.slots.index("rel")].tolist() == [0, 1, 2, 3, 4]
    assert (choice_EK[:, evaluation.slots.index("t_loc")] == router.NOTHING).all()
    rows = evaluate(task.backbone, Whole(serving, params), {}, evaluation, EvaluationConfig(mmedit=False))
    assert [row["rel_generated_exact"] for row in rows] == [1.0] * 5
    assert [row["t_loc_far"] for row in rows] == [1.0] * 5


def test_a_batch_is_its_rows(task, editor, committed, evaluation):
    serving, params = WAY.serving(editor), committed[0].params
    got, choice_EK = states(task.backbone, serving, params, evaluation)
    for number in range(5):
        row = evaluation.take(torch.tensor([number]))
        alone, choice_1K = states(task.backbone, serving, params, row)
        assert torch.equal(choice_EK[[number]], choice_1K)
        real = evaluation.real_EKS[number]
        torch.testing.assert_close(got[number][real], alone[0][real], atol=1e-5, rtol=1e-4)


def test_the_router_reads_the_input_of_its_site(task):
    supervision, _ = encode_requests(task.backbone, task.requests, TEMPLATE)
    batch, read = supervision.select(("edit",)), []
    handle = task.backbone.site(KEY).register_forward_hook(lambda module, args, output: read.append(args[0]))
    unedited(task.backbone, WAY.serving(task.editor), batch)
    handle.remove()
    expected = read[0][torch.arange(5), batch.predict_EKT[:, 0, 0]]
    assert torch.equal(prompt_states(task.backbone, KEY, batch)[:, 0], expected)
    by_key = states_of_edits(task.backbone, KEY, task.requests, TEMPLATE)
    assert by_key.shape[1] == len(KEY_SLOTS)
    torch.testing.assert_close(by_key[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_the_choice_is_the_edit_with_the_largest_excess(committed):
    thresholds = [0.9, 0.2, 0.1, 0.3, 0.0]
    params = committed[0].params | {router.THRESHOLDS: torch.tensor(thresholds)}
    size = params[router.WEIGHTS[0]].shape[0]
    states_RD = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    z_RW = router.project(params, states_RD)
    assert torch.allclose(z_RW.norm(dim=1), torch.ones(40))
    for z, choice in zip(z_RW, router.choose(params, states_RD).tolist(), strict=True):
        nearest = [max(float(key @ z) for key in keys) for keys in params[router.KEYS]]
        excess = [value - least for value, least in zip(nearest, thresholds, strict=True)]
        assert choice == (excess.index(max(excess)) if max(excess) > 0 else router.NOTHING)


def test_the_threshold_is_the_best_of_all():
    generator = torch.Generator().manual_seed(1)
    hits, near, far = (torch.rand(30, generator=generator) * 0.6 + low for low in (0.3, 0.1, 0.0))
    parts = [router.Similarities(hits[:9], near, far), router.Similarities(hits[9:], near, far)]
    got, shares = router.threshold(parts, 0.4)

    def gain(at: float) -> float:
        above = [sum(float(value) > at for value in values) / len(values) for values in (hits, near, far)]
        return above[0] - 0.4 * (above[1] + above[2])

    assert gain(got) == pytest.approx(max(gain(step / 200 - 1) for step in range(401)), abs=1e-6)
    assert shares["hits"] == pytest.approx(sum(float(value) > got for value in hits) / 30)


def test_twice_with_one_seed_is_the_same_and_progress_ends(task, committed):
    first, steps = committed
    again, _ = finish(WAY, task)
    assert first.params.keys() == again.params.keys()
    assert all(torch.equal(value, again.params[name]) for name, value in first.params.items())
    assert all(value.dtype == torch.float32 for value in first.params.values())
    assert [step.number for step in steps] == sorted(step.number for step in steps)
    assert steps[-1].number == steps[-1].total


def test_an_edit_removed_is_as_if_it_had_never_been_committed(task, committed):
    params, rest = committed[0].params, [0, 1, 3, 4]
    fewer = replace(
        task,
        requests=[task.requests[number] for number in rest],
        edits={name: value[rest] for name, value in task.edits.items()},
        start=params,
    )
    expected, steps = finish(WAY, fewer)
    assert not steps  # the router is there already
    removed = without(params, 2)
    assert removed.keys() == expected.params.keys()
    for name, value in removed.items():
        torch.testing.assert_close(value, expected.params[name], atol=1e-5, rtol=1e-5)
    one = {name: value[[2]] for name, value in task.edits.items()}
    added = WAY.with_added(task.backbone, removed, one, [task.requests[2]], TEMPLATE)
    for name, value in take(params, [0, 1, 3, 4, 2]).items():
        torch.testing.assert_close(added[name], value, atol=1e-5, rtol=1e-5)


def test_edits_are_rounded_to_the_stored_type(task, committed):
    name = "layers.1.ffn.in.lora_B"
    stored = committed[0].params[name]
    assert torch.equal(stored, task.edits[name].half().float()) and not torch.equal(stored, task.edits[name])


def test_what_cannot_be_routed_is_refused(task, backbone):
    with pytest.raises(InputError, match=r"those of 'wise' with these settings are not; choose editor.name=lora"):
        WAY.check(load_editor("wise"), "wise")
    with pytest.raises(InputError, match="'ftv'"):
        WAY.check(load_editor("ftv"), "ftv")
    with pytest.raises(InputError, match=r"'layers.0.attention.q' lies below commit.key \('layers.25%.ffn.in', in lay"):
        WAY.serving(load_editor("lora")).check(backbone)
    with pytest.raises(InputError, match=r"'layers.1.attention.q' lies below"):
        WAY.serving(load_editor("lora", {"sites": ["layers.1.attention.q"]})).check(backbone)
    with pytest.raises(InputError, match=r"commit.key: got 'layers.1.ffn.out', expected layers.<n>.ffn.in"):
        Routed(RoutedConfig(key="layers.1.ffn.out")).serving(task.editor).check(backbone)
    with pytest.raises(InputError, match="got 0 records of 0"):
        finish(WAY, replace(task, pool=[]))
    with pytest.raises(InputError, match="at least 16 of different facts, and got 9 records of 9"):
        finish(WAY, replace(task, pool=task.pool[:9]))
    with pytest.raises(InputError, match="needs the finished edits"):
        finish(WAY, replace(task, edits=None))
