"""The unedited model's answers are asked once, and a stored answer is the one that would be computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from odedit import EvaluationConfig, encode_requests, evaluate, load_editor
from odedit.backbones.base import Backbone
from odedit.evaluation.readout import Readout, UneditedAnswers
from odedit.inputs.batch import EditBatch, EditParams
from tests.support.requests import TEMPLATE, make_request


def random_edits(editor: Any, backbone: Backbone, batch: EditBatch, seed: int) -> EditParams:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in editor.init(backbone, batch).items()}
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "config", [EvaluationConfig(), EvaluationConfig(generate=False), EvaluationConfig(mmedit=False)]
)
def test_scores_with_the_store_are_those_without(backbone: Backbone, config: EvaluationConfig) -> None:
    requests = [make_request(number, full=number != 2) for number in range(4)]
    known = UneditedAnswers()
    for seed, name in enumerate(("ftl", "lora")):  # the second reads what the first has stored
        editor = load_editor(name)
        _, batch = encode_requests(backbone, requests, TEMPLATE)
        params = random_edits(editor, backbone, batch, seed)
        expected = evaluate(backbone, editor, params, batch, config)
        assert evaluate(backbone, editor, params, batch, config, known) == expected
    # Other groups of the same records: other padding.
    for part in ([3], [0, 2]):
        _, batch = encode_requests(backbone, [requests[number] for number in part], TEMPLATE)
        own = {name: value[part] for name, value in params.items()}
        scores = evaluate(backbone, editor, own, batch, config, known)
        assert scores == [expected[number] for number in part]


def test_known_answers_are_not_computed_again(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for name in ("suffix", "target_states"):
        whole = getattr(type(backbone), name)

        def counted(self: Backbone, *arguments: Any, whole: Any = whole, name: str = name, **values: Any) -> Any:
            calls[name] += 1
            return whole(self, *arguments, **values)

        monkeypatch.setattr(type(backbone), name, counted)
    editor = load_editor("ftl")
    _, batch = encode_requests(backbone, [make_request(0)], TEMPLATE)
    params, known = random_edits(editor, backbone, batch, 0), UneditedAnswers()
    numbers = []
    for _ in range(2):
        calls.clear()
        evaluate(backbone, editor, params, batch, known=known)
        numbers.append(dict(calls))
    assert numbers[1]["suffix"] * 2 == numbers[0]["suffix"]
    assert numbers[1]["target_states"] < numbers[0]["target_states"]


def test_what_decides_an_answer_tells_probes_apart(backbone: Backbone) -> None:
    """Another picture, question, target or measured value is another probe."""
    asked = []
    known = UneditedAnswers()

    def readout(number: int, measured: object = None) -> None:
        _, batch = encode_requests(backbone, [make_request(number)], TEMPLATE)

        def ask() -> Any:
            asked.append((number, measured))
            shape = batch.target_EKT.shape
            return Readout(torch.zeros(*shape, 10, dtype=torch.long), None, None)

        known.readout(batch, measured, ask)

    for number, measured in ((0, None), (0, None), (1, None), (0, "all"), (1, None)):
        readout(number, measured)
    assert asked == [(0, None), (1, None), (0, "all")]


def test_a_part_without_probes_is_no_part_with_known_answers(backbone: Backbone) -> None:
    """A long probe of one edit is a part of its own, which is empty for the other edit."""
    long, short = (make_request(number) for number in range(2))
    probe = replace(long.edit, prompt=" ".join(["who"] * 40))
    long, short = replace(long, probes={"m_gen": probe}), replace(short, probes={})
    editor, known = load_editor("ftl"), UneditedAnswers()
    _, batch = encode_requests(backbone, [long, short], TEMPLATE)
    params = random_edits(editor, backbone, batch, 0)
    part = batch.take(torch.tensor([1]))
    own = {name: value[1:] for name, value in params.items()}
    expected = evaluate(backbone, editor, own, part)
    for _ in range(2):
        assert evaluate(backbone, editor, own, part, known=known) == expected


def test_the_store_forgets_rather_than_grow(backbone: Backbone) -> None:
    editor, known = load_editor("ftl"), UneditedAnswers(max_bytes=5000)
    _, batch = encode_requests(backbone, [make_request(number) for number in range(6)], TEMPLATE)
    params = random_edits(editor, backbone, batch, 0)
    expected = evaluate(backbone, editor, params, batch)
    for _ in range(2):
        assert evaluate(backbone, editor, params, batch, known=known) == expected
    assert known._cells._bytes <= 5000
