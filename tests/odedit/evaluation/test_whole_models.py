"""Scores of a whole model: another checkpoint, or all edits of a committed model together."""

from __future__ import annotations

import pytest
import torch

from odedit import EditRequest, EvaluationConfig, Probe, encode_requests, evaluate, load_backbone, load_editor
from odedit.editing.merging import export
from odedit.evaluation.columns import LOCALITY_COLUMNS
from odedit.evaluation.scores import evaluate_model, evaluate_together
from odedit.inputs.batch import is_locality
from tests.support import tiny_current
from tests.support.limits import set_limits
from tests.support.requests import TEMPLATE, make_request


def random_params(editor, backbone, batch, count, scale):
    generator = torch.Generator().manual_seed(0)
    params = editor.init(backbone, batch)
    return {
        name: scale * torch.randn(count, *value.shape[1:], generator=generator, dtype=value.dtype)
        for name, value in params.items()
    }


@pytest.fixture(scope="module")
def requests():
    return [make_request(number, full=number != 2) for number in range(4)]


@pytest.mark.parametrize("family", ["blip2", "llava"])
@pytest.mark.parametrize("config", [EvaluationConfig(), EvaluationConfig(mmedit=False)], ids=["mmedit", "answers"])
def test_a_merged_checkpoint_scores_as_its_edit(family, config, requests, backbone, tmp_path):
    """Every request is asked of one edit, applied in `evaluate` and written to a checkpoint in `evaluate_model`."""
    model = backbone if family == "blip2" else load_backbone(family, "embedded")
    editor = load_editor("ftl")
    _, batch = encode_requests(model, requests, TEMPLATE)
    params = random_params(editor, model, batch, 1, 0.5)
    export(model, editor, params, tmp_path / "merged")
    merged = load_backbone(family, str(tmp_path / "merged"))
    repeated = {name: value.expand(len(requests), *value.shape[1:]) for name, value in params.items()}
    rows = evaluate_model(model, merged, batch, config=config)
    assert rows == evaluate(model, editor, repeated, batch, config)
    assert any(row["answer_before"] != row["answer_after"] for row in rows), "the edit changes nothing"
    assert merged.has_features_of(model) and model.has_features_of(merged)


@pytest.mark.parametrize("family", ["blip2", "auto"])
def test_a_model_against_itself_changes_nothing(family, requests, backbone, tmp_path):
    model = backbone if family == "blip2" else load_backbone(family, str(tiny_current.write("qwen2_5_vl", tmp_path)))
    _, batch = encode_requests(model, requests, TEMPLATE)
    for row in evaluate_model(model, model, batch):
        for name, value in row.items():
            if is_locality(name):
                assert value == 1.0
            elif f"{name}_before" in row:
                assert value == row[f"{name}_before"]
        assert row["answer_before"] == row["answer_after"]


def test_one_edit_together_is_that_edit_applied(requests, backbone, monkeypatch):
    _, batch = encode_requests(backbone, requests, TEMPLATE)
    for name in ("lora", "ftl"):
        editor = load_editor(name)
        params = random_params(editor, backbone, batch, 1, 0.1)
        repeated = {key: value.expand(len(requests), *value.shape[1:]) for key, value in params.items()}
        rows = evaluate_together(backbone, editor, params, batch)
        assert rows == evaluate(backbone, editor, repeated, batch)
        with monkeypatch.context() as patch:
            set_limits(patch, evaluated_values=1)
            assert evaluate_together(backbone, editor, params, batch) == rows


def test_a_changed_image_tower_answers_with_its_own_features(requests, backbone):
    """The reference asks each request of the changed model in a batch that the changed model has encoded itself."""
    changed = load_backbone("blip2", "embedded")
    with torch.no_grad():
        for weight in next(iter(changed.connector().values())).parameters():
            weight.mul_(-0.5)
    assert not changed.has_features_of(backbone)
    pictures = [picture for request in requests for picture in request.pictures()]
    features = changed.image_features(pictures)
    _, batch = encode_requests(backbone, requests, TEMPLATE)
    _, own = encode_requests(changed, requests, TEMPLATE)
    rows = evaluate_model(backbone, changed, batch, torch.stack(list(features.values())))
    itself = evaluate_model(changed, changed, own)
    assert [row["answer_after"] for row in rows] == [row["answer_after"] for row in itself]
    assert [row["m_gen"] for row in rows if "m_gen" in row] == [row["m_gen"] for row in itself if "m_gen" in row]
    assert [row["answer_after"] for row in rows] != [row["answer_before"] for row in rows]
    assert rows != evaluate_model(backbone, changed, batch), "the features of the unedited model would do"


def test_of_near_and_far_the_only_one_left_is_the_score(backbone):
    request = make_request(0)
    for left in ("m_loc", "m_loc_near"):
        probes = {left: request.probes[left], "t_loc": Probe("which language do they speak in belland?", "belish")}
        one = EditRequest("one", request.edit, probes=probes)
        _, batch = encode_requests(backbone, [one], TEMPLATE)
        editor = load_editor("ftl")
        (row,) = evaluate(backbone, editor, random_params(editor, backbone, batch, 1, 0.05), batch)
        for ending in LOCALITY_COLUMNS:
            name = f"m_loc_{ending}".rstrip("_")
            assert row[name] == row[f"{left}_{ending}".rstrip("_")]
        assert "m_loc_far" not in row
