"""Every risk has an effect: the embedded world's validation split, with one risk left out at a time."""

from __future__ import annotations

import pytest

from odedit import (
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
from odedit.data.images import ImageReader
from odedit.data.records import read_records
from odedit.data.supervision import Supervision, build_request
from odedit.inputs.batch import is_locality
from tests.support.requests import TEMPLATE

NUM_EDITS = 32


@pytest.fixture(scope="module")
def splits(worlds):
    paths = worlds[0]
    reader = ImageReader(str(paths["images"]), str(paths["images_rephrase"]))

    def requests(split, count):
        records = read_records(str(paths[split]), limit=count)
        return [build_request(record, reader, Supervision()) for record in records]

    return requests("train", 32), requests("validation", NUM_EDITS)


@pytest.fixture(scope="module")
def scores(backbone, splits):
    """Mean metrics with all three risks and with one left out, at the same number of steps."""
    train, validation = splits
    supervision, evaluation = encode_requests(backbone, validation, TEMPLATE)
    sigma2_0 = calibrate(backbone, train, TEMPLATE)
    editor = load_editor("ftl", {"sites": ("layers.0.ffn.out",), "learning_rate": 2e-3})
    result = {}
    for dropped in ("none", "reliability", "locality", "generality"):
        weights = {f"{dropped}_weight": 0.0} if dropped != "none" else {}
        objective = Objective(ObjectiveConfig(**weights), sigma2_0)
        edits = edit(backbone, editor, objective, supervision, Stopping(max_steps=20, worst_token_nll=1e-9))
        rows = evaluate(backbone, editor, stack_params([result.params for result in edits]), evaluation)
        result[dropped] = {
            "gen_risk": sum(result.curves["gen"][-1] for result in edits) / NUM_EDITS,
            **{name: sum(row[name] for row in rows) / NUM_EDITS for name in ("rel", "t_loc", "m_loc")},
        }
    return result


def test_without_reliability_nothing_is_edited(scores):
    assert scores["none"]["rel"] > 0.9
    assert scores["reliability"]["rel"] < 0.4


def test_without_locality_other_answers_change(scores):
    assert scores["locality"]["m_loc"] < scores["none"]["m_loc"] - 0.02


def test_without_generality_edit_and_rephrase_stay_apart(scores):
    assert scores["generality"]["gen_risk"] > 1.2 * scores["none"]["gen_risk"]


def test_held_out_supervision_shares_nothing_with_what_is_scored(splits):
    for request in splits[1]:
        scored = {(p.prompt, p.picture and p.picture.key) for p in (request.edit, *request.probes.values())}
        for slot, probe in request.supervision.items():
            assert (probe.prompt, probe.picture and probe.picture.key) not in scored, (request.edit_id, slot)
            if is_locality(slot) and probe.picture is not None:
                assert probe.picture.key != request.edit.picture.key
