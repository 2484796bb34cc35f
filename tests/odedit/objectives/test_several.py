"""Several rephrases as one risk: mean, worst, trimmed mean, and the mean weighted by agreement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from odedit import Objective, ObjectiveConfig, Stopping, edit, encode_requests, load_editor
from odedit.inputs.batch import rephrase_slots
from odedit.objectives.common.several import agreement, combined
from odedit.risks.risks import Risk
from tests.support.requests import TEMPLATE, make_picture, make_request

VALUES = torch.tensor([[4.0, 1.0, 9.0, 2.0, 3.0], [5.0, 7.0, 6.0, 0.0, 0.0]])
PRESENT = torch.tensor([[True] * 5, [True, True, True, False, False]])
RISK = Risk(VALUES, VALUES * 10)


@pytest.mark.parametrize(
    ("rephrases", "expected"), [("single", [3.8, 6.0]), ("worst", [9.0, 7.0]), ("trimmed", [3.0, 6.0])]
)
def test_the_mean_the_largest_and_the_mean_of_the_inner_ones(rephrases, expected):
    """Of five the smallest and the largest are trimmed, of three none."""
    risk = combined(RISK, PRESENT, rephrases)
    torch.testing.assert_close(risk.value, torch.tensor(expected))
    torch.testing.assert_close(risk.scale_gradient, 10 * torch.tensor(expected))


def test_only_the_worst_has_a_gradient():
    values = VALUES.clone().requires_grad_()
    combined(Risk(values, values), PRESENT, "worst").value.sum().backward()
    assert values.grad.tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]


def test_agreement_is_the_mean_cosine_with_the_others():
    moved_EKTD = torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]], [[-1.0, 0.0]], [[3.0, 3.0]]]])
    mask_EKT = torch.ones(1, 4, 1, dtype=torch.bool)
    half = 0.5**0.5
    # Sums of cosines: 1 - 1 + h, 1 - 1 + h, -1 - 1 - h (below 0), h + h - h.
    torch.testing.assert_close(agreement(moved_EKTD, mask_EKT), torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3]]))
    assert half + half - half == pytest.approx(half)
    mask_EKT[0, 3] = False
    assert agreement(moved_EKTD, mask_EKT).tolist() == [[pytest.approx(1 / 3)] * 3 + [0.0]], "no two agree on balance"
    assert agreement(torch.zeros_like(moved_EKTD), mask_EKT)[0, :3].tolist() == [pytest.approx(1 / 3)] * 3
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.25, 0.75, 0.0, 0.0]])
    assert combined(RISK, PRESENT, "agreeing", weights).value.tolist() == [2.5, 6.25]


def request_with(count):
    request = make_request(0)
    further = {}
    for slot in rephrase_slots(count)[2:]:
        first = request.supervision[slot.rpartition("_")[0]]
        number = int(slot.rpartition("_")[2])
        further[slot] = replace(first, prompt=f"{first.prompt} {number}", picture=make_picture(150 + number))
    return replace(request, supervision={**request.supervision, **further})


@pytest.mark.parametrize("rephrases", ["single", "multiple", "worst", "trimmed", "agreeing"])
def test_an_edit_reads_as_many_rephrases_as_its_request_has(backbone, rephrases):
    """More rephrases change the edit, and each of them its risk; one of each kind is what it was."""
    objective = Objective(ObjectiveConfig("odedit", sigma2_0=50.0, warmup=0.0, ramp=0.0, rephrases=rephrases))
    editor, curves = load_editor("ftl", {"learning_rate": 1e-3}), {}
    for count in (1, 3):
        batch, _ = encode_requests(backbone, [request_with(count)], TEMPLATE)
        assert objective.slots(editor, batch) == batch.slots and set(rephrase_slots(count)) < set(batch.slots)
        (result,) = edit(backbone, editor, objective, batch, Stopping(max_steps=3, worst_token_nll=1e-9))
        assert result.error is None
        curves[count] = result.curves["gen"]
    assert curves[1] != curves[3] and all(value >= 0 for value in curves[3])


def test_text_and_image_rephrases_of_one_number_are_joined(backbone):
    request = request_with(3)
    assert request.num_rephrases == 3 and request.rephrase(4) is None
    third = request.rephrase(3)
    assert third.prompt == request.supervision["text_rephrase_3"].prompt
    assert third.picture is request.supervision["image_rephrase_3"].picture
    batch, _ = encode_requests(backbone, [request], TEMPLATE, joined=True)
    assert batch.slots[-3:] == ("rephrase", "rephrase_2", "rephrase_3")
    objective, editor = Objective(ObjectiveConfig("rephrase")), load_editor("ftl", {"learning_rate": 3e-3})
    assert objective.slots(editor, batch) == ("edit", "rephrase", "rephrase_2", "rephrase_3")
    (result,) = edit(backbone, editor, objective, batch, Stopping(max_steps=200, worst_token_nll=0.5))
    alone = batch.select([slot for slot in batch.slots if not slot.startswith("rephrase_")])
    (first,) = edit(backbone, editor, objective, alone, Stopping(max_steps=200, worst_token_nll=0.5))
    assert result.stop_reason == first.stop_reason == "worst_token_nll" and result.steps > first.steps


def test_an_edit_beside_one_with_more_rephrases_is_the_edit_alone(backbone):
    """The mean is over the rephrases that an edit has itself."""
    few, many = request_with(1), replace(request_with(3), edit_id="other")
    objective, editor = Objective(ObjectiveConfig("rephrase")), load_editor("ftl", {"learning_rate": 3e-3})
    curves = []
    for requests in ([few, many], [few]):
        batch, _ = encode_requests(backbone, requests, TEMPLATE, joined=True)
        curves.append(edit(backbone, editor, objective, batch, Stopping(3, worst_token_nll=1e-9))[0].curves)
    torch.testing.assert_close(torch.tensor(curves[0]["gen"]), torch.tensor(curves[1]["gen"]))
    torch.testing.assert_close(torch.tensor(curves[0]["rel"]), torch.tensor(curves[1]["rel"]))
