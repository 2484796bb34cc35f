"""Batched edits against the reference loop: one edit at a time, the whole model in every step, double backward."""

from __future__ import annotations

import pytest

from odedit import Objective, ObjectiveConfig, Stopping, calibrate, edit, encode_requests, evaluate, load_editor
from odedit.inputs.batch import stack_params
from tests.benchmarks.reference import Reference
from tests.benchmarks.speed import FAR_COLUMNS
from tests.support.requests import TEMPLATE, make_request

REQUESTS = [make_request(number) for number in range(3)]
STEPS = 6


@pytest.mark.parametrize("name", ["wise", "tpatcher"])
def test_batched_cached_edits_are_those_of_the_reference_loop(backbone, name):
    settings = {"site": "layers.2.ffn.in"} if name == "wise" else {}
    editor = load_editor(name, settings)
    sigma2_0 = calibrate(backbone, REQUESTS, TEMPLATE)
    # With the warm-up: at phi_0 R_loc is at its minimum, where the sign of its g is rounding noise.
    objective = Objective(ObjectiveConfig(name="odedit", sigma2_0=sigma2_0))
    supervision, evaluation = encode_requests(backbone, REQUESTS, TEMPLATE, editor.sites)
    results = edit(backbone, editor, objective, supervision, Stopping(STEPS, worst_token_nll=1e-9))
    rows = evaluate(backbone, editor, stack_params([result.params for result in results]), evaluation)

    reference = Reference(backbone, editor, objective)
    for number in (0, 2):
        params, terms = reference.edit(REQUESTS[number], STEPS)
        curves = results[number].curves
        for risk in ("rel", "loc", "gen"):
            expected = [float(step.risks[risk].detach()) for step in terms]
            assert curves[risk] == pytest.approx(expected, rel=2e-3, abs=2e-5)
            slopes = [float(step.scale_gradients[risk].detach()) for step in terms]
            assert curves[f"g_{risk}"] == pytest.approx(slopes, rel=1e-2, abs=1e-4)
        assert curves["rel"][-1] < 0.9 * curves["rel"][0]
        for column, value in reference.score(REQUESTS[number], params).items():
            assert rows[number][FAR_COLUMNS.get(column, column)] == pytest.approx(value), column
