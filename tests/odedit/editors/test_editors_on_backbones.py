"""Every editor on every family: the checkpoint that ships, or random weights of the family's own class.

New editors and families are included by their file; `test_editor_contract` has the contract of an editor in depth.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from odedit import (
    EvaluationConfig,
    InputError,
    Objective,
    ObjectiveConfig,
    Stopping,
    backbones,
    edit,
    editors,
    encode_requests,
    evaluate,
    load_backbone,
    stack_params,
    world,
)
from odedit.editing.files import EditInfo, load_edits, save_edit
from odedit.editing.merging import export, merged_into
from odedit.editors.base import Mergeable
from odedit.inputs.batch import EDIT, EditBatch, EditParams
from tests.support import reading, tiny_current, tiny_models
from tests.support.requests import TEMPLATE, make_pool, make_request
from tests.support.small_editors import ready_editor

REQUESTS = [make_request(0), make_request(1, full=False), make_request(2)]
OBJECTIVES = {
    "native": Objective(ObjectiveConfig(name="native")),
    "odedit": Objective(ObjectiveConfig(warmup=0.0, ramp=0.0, sigma2_0=50.0)),
}
STEPS = Stopping(max_steps=3, worst_token_nll=1e-9)
# New neurons start at random values, and can first make the answer less likely.
LONGER = {
    ("tpatcher", name): Stopping(max_steps=60, worst_token_nll=1e-9) for name in ("qwen2_5_vl", "gemma3", "llava_phi3")
}
FIGURES = EvaluationConfig(generate=False)


CURRENT = {"qwen2_5_vl": 112, "qwen3_vl": None, "gemma3": None, "glm4v": None, "llava_phi3": None}
"""Models that `auto` reads, with their image size: three position axes; the same and features in several layers;
pictures attended to both ways; one matrix for gate and input; the same and one for queries, keys and values."""


@pytest.fixture(scope="module", params=[*backbones.names(), *CURRENT])
def model(request, tmp_path_factory):
    family = request.param
    if family in CURRENT:
        folder = tiny_current.write(family, tmp_path_factory.mktemp("model") / family)
        return load_backbone("auto", str(folder), image_size=CURRENT[family])
    try:
        world.checkpoint_path(family)
    except InputError:
        assert family in tiny_models.FAMILIES, f"{family}: neither ships a checkpoint nor has a tiny model in the tests"
        directory = tiny_models.write(family, tmp_path_factory.mktemp("model") / family)
        return load_backbone(family, str(directory))
    return load_backbone(family, "embedded")


@pytest.fixture(scope="module")
def encoded(model):
    """Supervision and evaluation batches, with features after or before the connector."""
    known = {}

    def encode(sites):
        before = any(backbones.is_connector(site) for site in sites)
        if before not in known:
            known[before] = encode_requests(model, REQUESTS, TEMPLATE, sites)
        return known[before]

    return encode


@dataclass(frozen=True, repr=False)
class Pair:
    """An editor on a model, with the parameters of three edits under each objective."""

    model: Any
    name: str
    editor: Any
    supervision: EditBatch
    evaluation: EditBatch
    logits: torch.Tensor
    edited: dict[str, EditParams]

    def logits_of(self, batch: EditBatch) -> torch.Tensor:
        with torch.no_grad():
            return self.model.head(self.model.suffix(self.model.prefix(batch, *self.editor.sites)))


def steps_of(name: str, model: Any) -> Stopping:
    return LONGER.get((name, Path(model.checkpoint).name), STEPS)


@pytest.fixture(scope="module", params=editors.names())
def pair(request, model, encoded, tmp_path_factory):
    editor = ready_editor(request.param, model, tmp_path_factory.mktemp("weights"))
    if request.param == "ftv" and getattr(model, "sample", True) is None:  # no site, or pictures of unlike sizes
        with pytest.raises(InputError, match=r"connector|backbone\.image_size"):
            editor.check(model)
            encoded(editor.sites or model.connector_sites())
        pytest.skip("the model has no site of the connector")
    editor.check(model)
    supervision, evaluation = encoded(editor.sites)
    plain = Pair(model, request.param, editor, supervision, evaluation, torch.empty(0), {})
    before = plain.logits_of(supervision)
    edited = {}
    for name, objective in OBJECTIVES.items():
        steps = steps_of(request.param, model)
        results = edit(model, editor, objective, supervision, steps)
        assert [result.error for result in results] == [None] * 3
        assert {result.steps for result in results} == {steps.max_steps if editor.max_steps else 0}
        edited[name] = stack_params([result.params for result in results])
    return dataclasses.replace(plain, logits=before, edited=edited)


def nll_E(logits: torch.Tensor, batch: EditBatch) -> torch.Tensor:
    """Mean NLL of the target of each edit."""
    k = batch.slots.index(EDIT)
    values = []
    for e in range(batch.num_edits):
        mask = batch.target_mask_EKT[e, k]
        log_p = logits[e, k, batch.predict_EKT[e, k][mask]].log_softmax(dim=-1)
        values.append(-log_p.gather(1, batch.target_EKT[e, k][mask][:, None]).mean())
    return torch.stack(values)


def test_phi_0_is_neutral_as_declared(pair):
    params = pair.editor.init(pair.model, pair.supervision)
    with pair.editor.applied(pair.model, params, pair.supervision):
        assert torch.equal(pair.logits_of(pair.supervision), pair.logits) == pair.editor.starts_neutral


def test_positions_behind_a_prompt_are_those_of_the_whole(pair):
    reading.check_target_states(pair.model, pair.evaluation, pair.editor, pair.edited["native"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_edit_lowers_its_nll_and_leaves_nothing_behind(pair, objective):
    weights = {name: value.clone() for name, value in pair.model.model.state_dict().items()}
    with pair.editor.applied(pair.model, pair.edited[objective], pair.supervision):
        edited = pair.logits_of(pair.supervision)
    assert (edited != pair.logits).flatten(1).any(dim=1).all()
    start = pair.logits
    if pair.editor.max_steps:  # else `init` is the whole edit, and the start is the model
        with pair.editor.applied(pair.model, pair.editor.init(pair.model, pair.supervision), pair.supervision):
            start = pair.logits_of(pair.supervision)
    assert nll_E(edited, pair.supervision).mean() < nll_E(start, pair.supervision).mean()
    assert torch.equal(pair.logits_of(pair.supervision), pair.logits)
    assert all(torch.equal(value, weights[name]) for name, value in pair.model.model.state_dict().items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_edit_alone_is_the_edit_of_the_batch(pair, objective):
    supervision, _ = encode_requests(pair.model, REQUESTS[1:2], TEMPLATE, pair.editor.sites)
    (alone,) = edit(pair.model, pair.editor, OBJECTIVES[objective], supervision, steps_of(pair.name, pair.model))
    batched = {name: value[1:2] for name, value in pair.edited[objective].items()}
    for name, both in stack_params([alone.params, batched]).items():
        # Adam amplifies gradients that consist of rounding errors.
        tolerance = 2e-3 if pair.editor.optimizer.kind == "sgd" else 0.1
        assert (both[0] - both[1]).norm() <= tolerance * both[0].norm() + 1e-6, name


def test_saved_and_read_back_it_scores_the_same(pair, tmp_path):
    params, paths = pair.edited["odedit"], []
    for e, edit_id in enumerate(pair.supervision.edit_ids):
        info = EditInfo(
            edit_id, pair.name, dataclasses.asdict(pair.editor.config), pair.model.family, pair.model.checkpoint,
            pair.model.fingerprint, "mmedit",
        )  # fmt: skip
        paths.append(tmp_path / f"{edit_id}.safetensors")
        save_edit(paths[-1], {name: value[e : e + 1] for name, value in params.items()}, info)
    editor, read, _ = load_edits(paths, pair.model)
    expected = evaluate(pair.model, pair.editor, params, pair.evaluation, FIGURES)
    assert evaluate(pair.model, editor, read, pair.evaluation, FIGURES) == expected


def test_merged_into_a_checkpoint_the_edits_answer_as_they_do_together(pair, tmp_path):
    params = pair.edited["odedit"]
    if not isinstance(pair.editor, Mergeable):
        with pytest.raises(InputError, match="cannot be merged"):
            export(pair.model, pair.editor, params, tmp_path)
        return
    export(pair.model, pair.editor, params, tmp_path)
    size = getattr(pair.model.processor, "side", None)
    merged = load_backbone(pair.model.family, str(tmp_path), image_size=size)
    before = pair.logits_of(pair.evaluation)
    with pair.editor.together(pair.model, params, pair.evaluation):
        expected = pair.logits_of(pair.evaluation)
    assert not torch.equal(expected, before)
    # The embedded checkpoints store half precision, edits in memory single precision.
    logits = dataclasses.replace(pair, model=merged).logits_of(pair.evaluation)
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
    with merged_into(pair.model, pair.editor, params):
        torch.testing.assert_close(pair.logits_of(pair.evaluation), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(pair.logits_of(pair.evaluation), before)


def test_an_editor_from_outside_edits_a_family_from_outside(tmp_path):
    """Both are named by dotted modules; the gradient is that of torch on the library's module."""
    model = load_backbone("outside.terse_llava", str(tiny_models.write("llava", tmp_path / "model")))
    editor = editors.load_editor("outside.gains", {"site": "layers.1.ffn.out"})
    editor.check(model)
    supervision, evaluation = encode_requests(model, REQUESTS, TEMPLATE, editor.sites)
    results = edit(model, editor, OBJECTIVES["native"], supervision, Stopping(max_steps=1, worst_token_nll=1e-9))
    assert all(result.error is None and result.params["gains"].any() for result in results)

    gains = torch.zeros(model.hidden_size, requires_grad=True)
    handle = model.site("layers.1.ffn.out").register_forward_hook(lambda module, args, output: output * (1 + gains))
    logits = model.head(model.suffix(model.prefix(supervision, *editor.sites)))
    handle.remove()
    for loss, result in zip(nll_E(logits, supervision), results, strict=True):
        (gradient,) = torch.autograd.grad(loss, gains, retain_graph=True)
        torch.testing.assert_close(result.params["gains"][0], -0.1 * gradient, rtol=1e-4, atol=1e-7)
    rows = evaluate(model, editor, stack_params([result.params for result in results]), evaluation, FIGURES)
    assert len(rows) == len(REQUESTS)


@pytest.mark.parametrize("objective", ["native", "rephrase", "odedit", "contrast"])
@pytest.mark.parametrize("name", editors.names())
def test_a_model_in_half_precision_is_edited_in_single(name, objective, tmp_path):
    """Parameters and losses are float32, and the edit learns."""
    model = load_backbone("blip2", "embedded", dtype="bfloat16")
    editor = ready_editor(name, model, tmp_path)
    pool = make_pool(model, 4, editor.sites)
    supervision, evaluation = encode_requests(model, REQUESTS, TEMPLATE, editor.sites, pool)
    config = ObjectiveConfig(name=objective, sigma2_0=50.0, warmup=0.0, ramp=0.0, negatives=4)
    results = edit(model, editor, Objective(config), supervision, Stopping(max_steps=5, worst_token_nll=1e-9))
    assert [result.error for result in results] == [None] * 3
    params = stack_params([result.params for result in results])
    assert {value.dtype for value in params.values() if value.is_floating_point()} == {torch.float32}
    if editor.max_steps:
        assert sum(result.curves["rel"][-1] - result.curves["rel"][0] for result in results) < 0
    rows = evaluate(model, editor, params, evaluation, FIGURES)
    assert all(0 <= row["rel"] <= 1 for row in rows)
