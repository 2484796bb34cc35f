"""The contract of every editor, on the embedded model. A new editor is included by its file."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from odedit import (
    InputError,
    Objective,
    ObjectiveConfig,
    Stopping,
    calibrate,
    edit,
    encode_requests,
    evaluate,
    load_editor,
    stack_params,
)
from odedit import editors as package
from odedit.backbones import is_connector
from odedit.editing.files import EditInfo, load_edit, load_edits, save_edit
from odedit.editors.base import Mergeable
from odedit.inputs import batch as edits
from odedit.risks.risks import reliability
from odedit.runtime.gather import gather_positions
from tests.support import reading
from tests.support.requests import TEMPLATE, make_pool
from tests.support.small_editors import SMALL, ready_editor

OBJECTIVES = [
    ObjectiveConfig(name="native"),
    ObjectiveConfig(name="odedit", warmup=0.0),
    ObjectiveConfig(name="contrast", negatives=4, negatives_at_once=2),
]
RAMPED = [
    ObjectiveConfig(name="odedit", warmup=0.3, ramp=0.3) if config.name == "odedit" else config for config in OBJECTIVES
]


@pytest.fixture(scope="module", params=package.names())
def editor(request, backbone, tmp_path_factory):
    return ready_editor(request.param, backbone, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def encoded(backbone, requests_8):
    """Batches for an editor's sites: with features after or before the connector."""
    known = {}

    def encode(editor):
        before = any(is_connector(site) for site in editor.sites)
        if before not in known:
            pool = make_pool(backbone, sites=editor.sites)
            known[before] = encode_requests(backbone, requests_8, TEMPLATE, editor.sites, pool)
        return known[before]

    return encode


@pytest.fixture(scope="module")
def sigma2_0(backbone, requests_8):
    return calibrate(backbone, requests_8, TEMPLATE)


@pytest.fixture(scope="module")
def edited(backbone, editor, encoded, sigma2_0):
    """Results of `edit` on the eight requests, made once for all tests that only read them."""
    known = {}

    def results(config, stopping):
        if (key := repr((config, stopping))) not in known:
            known[key] = edit(backbone, editor, Objective(config, sigma2_0), encoded(editor)[0], stopping)
        return known[key]

    return results


def logits_of(backbone, editor, batch):
    with torch.no_grad():
        return backbone.head(backbone.suffix(backbone.prefix(batch, editor.sites[0])))


def nll_of_the_edit(backbone, editor, batch):
    with torch.no_grad():
        hidden = backbone.suffix(backbone.prefix(batch, *editor.sites))
        logits = backbone.head(gather_positions(hidden, batch.predict_EKT)[:, 0])
        return reliability(logits, batch.target_EKT[:, 0], batch.target_mask_EKT[:, 0]).value


def tolerance_of(editor):
    """Tolerance of phi_e, in norm. Where a gradient consists of rounding errors, which differ between machines, Adam
    still takes a full step of either sign.
    """
    return 1e-3 if editor.optimizer.kind == "sgd" else 0.1


def assert_same_course(editor, result, other):
    """Asserts equal curves; rounding errors that Adam amplifies are small at first and grow with the steps."""
    grown = 2e-3 if editor.optimizer.kind == "sgd" else 5e-2
    assert result.curves.keys() == other.curves.keys()
    for term, curve in result.curves.items():
        assert curve[:4] == pytest.approx(other.curves[term][:4], rel=4e-3, abs=4e-4), term
        assert curve == pytest.approx(other.curves[term], rel=grown, abs=2e-2 * grown + 2e-4), term


def test_config_is_frozen_and_has_defaults(editor):
    config = type(editor).Config()
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)
    assert "Attributes:" in type(editor).Config.__doc__


def test_phi_0_changes_no_logit(backbone, editor, encoded):
    supervision, _ = encoded(editor)
    params = editor.init(backbone, supervision)
    assert all(len(value) == supervision.num_edits and value.dtype == torch.float32 for value in params.values())
    before = logits_of(backbone, editor, supervision)
    with editor.applied(backbone, params, supervision):
        assert torch.equal(logits_of(backbone, editor, supervision), before) == editor.starts_neutral


@pytest.mark.parametrize("only_read", [False, True])
def test_phi_0_from_a_prefix_is_phi_0(backbone, editor, encoded, only_read):
    supervision, _ = encoded(editor)
    read_EKT = supervision.predict_EKT if only_read else None
    prefix = backbone.prefix(supervision, *editor.sites, positionwise=editor.positionwise, read_EKT=read_EKT)
    expected, params = editor.init(backbone, supervision), editor.init(backbone, supervision, prefix)
    assert expected.keys() == params.keys()
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-4, atol=1e-5)


def test_applied_then_removed_is_bitwise_the_model_also_after_an_exception(backbone, editor, encoded, edited):
    supervision, _ = encoded(editor)
    before = logits_of(backbone, editor, supervision)
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    params = stack_params([result.params for result in edited(ObjectiveConfig(), Stopping(max_steps=3))])
    with pytest.raises(RuntimeError, match="inside"), editor.applied(backbone, params, supervision):
        changed = logits_of(backbone, editor, supervision)
        raise RuntimeError("inside")
    assert not torch.equal(changed, before)
    assert torch.equal(logits_of(backbone, editor, supervision), before)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_the_positions_that_are_read_are_those_of_the_whole(backbone, editor, encoded):
    """Also for a positionwise editor, whose last layer does not run at the other positions."""
    supervision, _ = encoded(editor)
    params = editor.init(backbone, supervision)
    params = {name: value if name in editor.frozen else value + 0.01 for name, value in params.items()}
    states = []
    with torch.no_grad(), editor.applied(backbone, params, supervision):
        for positionwise, read in ((False, None), (editor.positionwise, supervision.predict_EKT)):
            prefix = backbone.prefix(supervision, *editor.sites, positionwise=positionwise)
            states.append(backbone.suffix(prefix, read))
    whole = gather_positions(states[0], supervision.predict_EKT)
    torch.testing.assert_close(states[1], whole, rtol=1e-4, atol=1e-4)


def test_a_continued_forward_equals_a_whole_one(backbone, editor, encoded, edited):
    """Tokens other than the target, as in inference: a continued forward equals a whole one."""
    _, evaluation = encoded(editor)
    results = edited(ObjectiveConfig(), Stopping(max_steps=3))
    reading.check_target_states(backbone, evaluation, editor, stack_params([result.params for result in results]))


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: config.name)
def test_alone_equals_in_a_batch_of_8(backbone, editor, encoded, edited, requests_8, sigma2_0, config):
    _, evaluation = encoded(editor)
    objective = Objective(config, sigma2_0)
    stopping = Stopping(max_steps=6, worst_token_nll=0.5)
    together = edited(config, stopping)
    rows = evaluate(backbone, editor, stack_params([result.params for result in together]), evaluation)
    for index in (0, 5, 7):
        alone_supervision, alone_evaluation = encode_requests(
            backbone, [requests_8[index]], TEMPLATE, editor.sites, make_pool(backbone, sites=editor.sites)
        )
        (alone,) = edit(backbone, editor, objective, alone_supervision, stopping)
        assert alone.steps == together[index].steps
        assert alone.stop_reason == together[index].stop_reason
        # Stacked, since the two may be padded to different lengths.
        both = stack_params([alone.params, together[index].params])
        for key, (one, other) in both.items():
            assert (one - other).norm() <= tolerance_of(editor) * one.norm() + 1e-6, key
        assert_same_course(editor, alone, together[index])
        (row,) = evaluate(backbone, editor, alone.params, alone_evaluation)
        assert row.pop("answers") == rows[index].pop("answers")
        assert row == {key: pytest.approx(value) for key, value in rows[index].items()}


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: config.name)
def test_sequences_that_run_apart_by_length_end_as_those_that_did_not(
    backbone, editor, encoded, sigma2_0, config, monkeypatch
):
    monkeypatch.setattr(edits, "_WORTH_SPLITTING", 0.0)
    supervision, evaluation = encoded(editor)
    assert len(supervision.parts()) == len(evaluation.parts()) == 2
    objective, stopping = Objective(config, sigma2_0), Stopping(max_steps=6, worst_token_nll=0.5)
    unknown = [dataclasses.replace(batch, lengths=()) for batch in (supervision, evaluation)]
    assert [len(batch.parts()) for batch in unknown] == [1, 1]
    apart, together = (edit(backbone, editor, objective, batch, stopping) for batch in (supervision, unknown[0]))
    for one, other in zip(apart, together, strict=True):
        assert (one.edit_id, one.steps, one.stop_reason) == (other.edit_id, other.steps, other.stop_reason)
        both = stack_params([one.params, other.params])
        assert all((a - b).norm() <= tolerance_of(editor) * a.norm() + 1e-6 for a, b in both.values())
        assert_same_course(editor, one, other)
    params = stack_params([result.params for result in apart])
    rows, in_one = (evaluate(backbone, editor, params, batch) for batch in (evaluation, unknown[1]))
    assert rows == in_one
    assert [list(row) for row in rows] == [list(row) for row in in_one], "columns in another order"


@pytest.mark.parametrize("config", RAMPED, ids=lambda config: config.name)
def test_edits_that_wait_end_as_those_that_did_not(backbone, editor, encoded, edited, sigma2_0, config):
    """Three at a time: edits that enter later have their own steps, moments, penalty and multiplier."""
    supervision, _ = encoded(editor)
    objective = Objective(config, sigma2_0)
    stopping = Stopping(max_steps=6, worst_token_nll=0.5)
    at_once = edited(config, stopping)
    in_turn = edit(backbone, editor, objective, supervision, stopping, width=3)
    for one, other in zip(at_once, in_turn, strict=True):
        assert (one.edit_id, one.steps, one.stop_reason) == (other.edit_id, other.steps, other.stop_reason)
        both = stack_params([one.params, other.params])
        assert all((a - b).norm() <= tolerance_of(editor) * a.norm() + 1e-6 for a, b in both.values())
        assert_same_course(editor, one, other)


@pytest.mark.parametrize("config", OBJECTIVES[1:], ids=lambda config: config.name)
@pytest.mark.parametrize("width", [8, 3, 1])
def test_a_neutral_start_diverges_in_nothing(backbone, editor, encoded, sigma2_0, width, config):
    """Not even by rounding errors, which Adam would amplify."""
    supervision, _ = encoded(editor)
    objective = Objective(config, sigma2_0)
    results = edit(backbone, editor, objective, supervision, Stopping(max_steps=1), width=width)
    first = [(result.curves["loc"][0], result.curves.get("g_loc", [0.0])[0]) for result in results]
    assert (first == [(0.0, 0.0)] * len(results)) == editor.starts_neutral


def test_a_finished_edit_does_not_move_again(backbone, editor, encoded, sigma2_0):
    """A stopped edit is constant while the others of its batch go on."""
    supervision, _ = encoded(editor)
    # The penalty's schedule follows max_steps, which differs between the runs.
    objective = Objective(ObjectiveConfig(penalty="none"), sigma2_0)
    free = edit(backbone, editor, objective, supervision, Stopping(max_steps=12, worst_token_nll=1e-9))
    if editor.max_steps == 0:  # `init` is the whole edit
        assert {result.steps for result in free} == {0}
        return
    threshold = sorted(result.curves["worst_nll"][6] for result in free)[len(free) // 2]
    results = edit(backbone, editor, objective, supervision, Stopping(max_steps=12, worst_token_nll=threshold))
    index = min(range(len(results)), key=lambda i: results[i].steps)
    steps = results[index].steps
    assert steps < max(result.steps for result in results), "all stopped at the same step: the test shows nothing"
    cut = edit(backbone, editor, objective, supervision, Stopping(max_steps=steps, worst_token_nll=threshold))
    for key, value in results[index].params.items():
        assert torch.equal(value, cut[index].params[key])


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: config.name)
def test_same_seed_same_result(backbone, editor, encoded, sigma2_0, config):
    supervision, _ = encoded(editor)
    runs = [
        edit(backbone, editor, Objective(config, sigma2_0), supervision, Stopping(max_steps=4), 7) for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert first.curves == second.curves
        assert all(torch.equal(first.params[key], second.params[key]) for key in first.params)


def test_an_edit_learns(backbone, editor, encoded, sigma2_0):
    supervision, _ = encoded(editor)
    results = edit(backbone, editor, Objective(ObjectiveConfig(name="native")), supervision, Stopping(max_steps=10))
    before_E = nll_of_the_edit(backbone, editor, supervision)
    with editor.applied(backbone, stack_params([result.params for result in results]), supervision):
        after_E = nll_of_the_edit(backbone, editor, supervision)
    assert bool((after_E < before_E).all())
    for result in results:
        assert result.error is None
        assert {len(curve) for curve in result.curves.values()} == {result.steps + 1}


def test_odedit_logs_every_term_and_lambda_per_step(backbone, editor, encoded, sigma2_0):
    supervision, _ = encoded(editor)
    objective = Objective(ObjectiveConfig(warmup=0.0, ramp=0.0), sigma2_0)
    result = edit(backbone, editor, objective, supervision, Stopping(max_steps=4))[0]
    expected = {"rel", "loc", "gen", "own", "penalty", "lambda", "objective", "worst_nll", "g_rel", "g_loc", "g_gen"}
    assert set(result.curves) == expected
    assert all(value > 0 for value in result.curves["lambda"])
    if editor.max_steps:
        assert len(set(result.curves["lambda"])) > 1


def test_saved_and_read_back_it_scores_the_same(backbone, editor, encoded, edited, tmp_path):
    _, evaluation = encoded(editor)
    results = edited(ObjectiveConfig(), Stopping(max_steps=3))
    name = type(editor).__module__.rsplit(".", 1)[1]
    paths = []
    for result in results:
        info = EditInfo(
            edit_id=result.edit_id, editor=name, editor_config=dataclasses.asdict(editor.config),
            family=backbone.family, checkpoint=backbone.checkpoint, fingerprint=backbone.fingerprint, template="mmedit",
        )  # fmt: skip
        paths.append(tmp_path / f"{result.edit_id}.safetensors")
        save_edit(paths[-1], result.params, info)
    read_editor, params, infos = load_edits(paths, backbone)
    assert [info.edit_id for info in infos] == [result.edit_id for result in results]
    expected = evaluate(backbone, editor, stack_params([result.params for result in results]), evaluation)
    assert evaluate(backbone, read_editor, params, evaluation) == expected


def test_together_with_one_edit_is_applied(backbone, editor, requests_8, sigma2_0):
    supervision, evaluation = encode_requests(backbone, requests_8[:1], TEMPLATE, editor.sites)
    (result,) = edit(backbone, editor, Objective(ObjectiveConfig(), sigma2_0), supervision, Stopping(max_steps=6))
    with editor.applied(backbone, result.params, evaluation):
        alone = logits_of(backbone, editor, evaluation)
    with editor.together(backbone, result.params, evaluation):
        torch.testing.assert_close(logits_of(backbone, editor, evaluation), alone, rtol=1e-5, atol=1e-5)


def test_merged_weights_are_the_edits_together(backbone, editor, encoded, edited, tmp_path):
    from odedit import load_backbone
    from odedit.editing.merging import export

    _, evaluation = encoded(editor)
    params = stack_params([result.params for result in edited(ObjectiveConfig(), Stopping(max_steps=3))])
    if not isinstance(editor, Mergeable):
        with pytest.raises(InputError, match="cannot be merged"):
            export(backbone, editor, params, tmp_path)
        return
    export(backbone, editor, params, tmp_path)
    exported = load_backbone("blip2", str(tmp_path))
    with editor.together(backbone, params, evaluation):
        expected = logits_of(backbone, editor, evaluation)
    # The checkpoint stores half precision.
    torch.testing.assert_close(logits_of(exported, editor, evaluation), expected, rtol=1e-2, atol=1e-2)
    assert exported.fingerprint != backbone.fingerprint


def test_a_diverging_edit_fails_alone(backbone, batches, sigma2_0):
    """An edit whose loss is not finite is reported; the others are the same as without it."""
    supervision, _ = batches
    editor = load_editor("ftl", SMALL["ftl"])
    objective = Objective(ObjectiveConfig(warmup=0.0), sigma2_0)
    clean = edit(backbone, editor, objective, supervision, Stopping(max_steps=3))
    features = supervision.features_NLD.clone()
    features[supervision.picture_EK[2, 0]] = torch.nan
    poisoned = dataclasses.replace(supervision, features_NLD=features)
    results = edit(backbone, editor, objective, poisoned, Stopping(max_steps=3))
    assert results[2].error is not None and "not finite" in results[2].error
    assert results[2].stop_reason == "failed"
    for index in (0, 1, 3, 4):
        assert results[index].error is None
        assert all(torch.equal(results[index].params[k], clean[index].params[k]) for k in clean[index].params)


def test_the_order_of_sites_does_not_matter(backbone, batches, sigma2_0):
    supervision, _ = batches
    sites = ("layers.1.ffn.in", "layers.3.ffn.out", "layers.1.attention.out")
    results = []
    for order in (sites, sites[::-1]):
        editor = load_editor("ftl", {"sites": order, "learning_rate": 1e-3})
        results.append(
            edit(backbone, editor, Objective(ObjectiveConfig(), sigma2_0), supervision, Stopping(max_steps=2))
        )
    for first, second in zip(*results, strict=True):
        for name in sites:
            assert first.params[name].any()
            torch.testing.assert_close(first.params[name], second.params[name])


def test_settings_that_do_not_fit_the_model_are_named(backbone):
    with pytest.raises(InputError, match="feeds no activation"):
        load_editor("wise", {"site": "layers.2.attention.out"}).check(backbone)
    with pytest.raises(InputError, match="expected different matrices"):
        load_editor("ftl", {"sites": ("layers.3.ffn.in", "layers.-1.ffn.in")}).check(backbone)
    with pytest.raises(InputError, match="layers.<0..3>"):
        load_editor("wise").check(backbone)


def test_wise_moves_and_stores_only_what_its_mask_lets_change(backbone, batches, sigma2_0):
    supervision, _ = batches
    editor = load_editor("wise", SMALL["wise"])
    mask = torch.rand(512, 128, generator=torch.Generator().manual_seed(0)) < 0.2
    start = editor.init(backbone, supervision)["side_live"]
    assert start.shape == (supervision.num_edits, int(mask.sum()))
    kept = editor.constrain({"side_live": start + torch.linspace(0.5, 3.0, len(start))[:, None]})["side_live"]
    assert kept.amin() == 0.5 and kept.amax() == 1.0, "clamped to 1"
    (result, *_) = edit(backbone, editor, Objective(ObjectiveConfig(), sigma2_0), supervision, Stopping(max_steps=2))
    (side,) = editor._side(backbone, result.params["side_live"])
    assert torch.equal(side[mask], result.params["side_live"][0]) and not side[~mask].any()


def test_edits_are_told_apart_by_every_part_of_the_weights(backbone, tmp_path):
    """A merged checkpoint has the same configuration and file sizes, and other weights deep inside the file."""
    import shutil

    from odedit import world
    from odedit.backbones import fingerprint

    copy = tmp_path / "model"
    shutil.copytree(world.checkpoint_path("blip2"), copy)
    assert fingerprint("blip2", str(copy)) == fingerprint("blip2", "embedded") == backbone.fingerprint
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-(1 << 18) :] = bytes(1 << 18)
    file.write_bytes(content)
    assert fingerprint("blip2", str(copy)) != backbone.fingerprint


def test_names_and_settings_are_checked():
    with pytest.raises(InputError, match="clip_norm: got -1"):
        load_editor("ftl", {"clip_norm": -1.0})
    with pytest.raises(InputError, match="margin_in: got -1"):
        load_editor("wise", {"margin_in": -1.0})
    with pytest.raises(InputError, match=r"Unknown editor 'wize'. Did you mean 'wise'\?"):
        load_editor("wize")
    with pytest.raises(InputError, match="Did you mean 'mask_ratio'"):
        load_editor("wise", {"mask_ration": 0.5})
    with pytest.raises(InputError, match="mask_ratio: got 1.5, expected a finite number > 0 and <= 1"):
        load_editor("wise", {"mask_ratio": 1.5})


def test_edit_files_that_do_not_fit_are_named(backbone, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_edit(tmp_path / "none.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_edit(tmp_path / "damaged.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="expected 'odedit-edit-1'"):
        load_edit(tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "half.safetensors", metadata={"format": "odedit-edit-1", "info": "{}"})
    with pytest.raises(InputError, match="its metadata is damaged"):
        load_edit(tmp_path / "half.safetensors")
    outside = EditInfo("e", "some.module", {}, "blip2", "embedded", backbone.fingerprint, "mmedit")
    save_edit(tmp_path / "outside.safetensors", {"a": torch.zeros(1)}, outside)
    with pytest.raises(InputError, match="made by the editor 'some.module', which is not one of"):
        load_edits([tmp_path / "outside.safetensors"], backbone)
    info = EditInfo("e", "ftl", {}, "blip2", "elsewhere", "0" * 16, "mmedit")
    save_edit(tmp_path / "foreign.safetensors", {"layers.-1.ffn.in": torch.zeros(1, 512, 128)}, info)
    with pytest.raises(InputError, match="belongs to 'elsewhere' .* made by an earlier odedit"):
        load_edits([tmp_path / "foreign.safetensors"], backbone)
    other = dataclasses.replace(info, fingerprint="0" * len(backbone.fingerprint))
    save_edit(tmp_path / "other.safetensors", {"layers.-1.ffn.in": torch.zeros(1, 512, 128)}, other)
    with pytest.raises(InputError, match="belongs to 'elsewhere' .* made for another model"):
        load_edits([tmp_path / "other.safetensors"], backbone)
