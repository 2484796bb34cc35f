"""Metrics against plain one-at-a-time computations, and statistics against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_up import TEMPLATE, make_request
from scipy import stats

from odedit import EvaluationConfig, encode_requests, evaluate, load_editor, metrics, paired, summarize
from odedit.key_values import KeyValues
from odedit.metrics import MAIN, Estimate, estimate, greedy


@pytest.fixture(scope="module")
def scored(backbone):
    """Eight edits with random weight differences: they change some answers and not others."""
    requests = [make_request(number, full=number != 5) for number in range(8)]
    _, evaluation = encode_requests(backbone, requests, TEMPLATE)
    editor = load_editor("ftl")
    params = editor.init(backbone, evaluation)
    generator = torch.Generator().manual_seed(0)
    params = {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    return requests, evaluation, editor, params, evaluate(backbone, editor, params, evaluation)


def run_one(backbone, editor, params, index, probe, tokens=None):
    """Logits of one probe for one edit, nothing batched."""
    from odedit import EditRequest

    request = EditRequest("one", probe)
    _, batch = encode_requests(backbone, [request], TEMPLATE)
    if tokens is not None:
        batch.tokens_EKS[0, 0] = tokens
    one = {name: value[index : index + 1] for name, value in params.items()} if params else None
    with torch.no_grad():
        prefix = backbone.prefix(batch, editor.sites[0])
        if one is None:
            return batch, backbone.head(backbone.suffix(prefix))[0, 0]
        with editor.applied(backbone, one, batch):
            return batch, backbone.head(backbone.suffix(prefix))[0, 0]


def test_every_figure_equals_the_plain_computation(backbone, scored):
    requests, _, editor, params, rows = scored
    for index in (0, 3, 5):
        request, row = requests[index], rows[index]
        probes = {"rel": request.edit, **request.probes}
        for name, probe in probes.items():
            batch, after = run_one(backbone, editor, params, index, probe)
            _, before = run_one(backbone, editor, None, index, probe)
            predict, target = batch.predict_EKT[0, 0], batch.target_EKT[0, 0]
            if "loc" in name:
                key = name + "_far" if name == "m_loc" and "m_loc_near" in probes else name
                same = before.argmax(-1)[predict] == after.argmax(-1)[predict]
                assert row[key] == pytest.approx(float(same.double().mean()))
                ten = before.topk(10).indices == after.topk(10).indices
                published = ten if name.startswith("m_") else ten[:, 0]
                assert row[f"{key}_mmedit"] == pytest.approx(float(published.double().mean()))
            else:
                for suffix, logits in (("", after), ("_before", before)):
                    right = logits.argmax(-1)[predict] == target
                    assert row[name + suffix] == pytest.approx(float(right.double().mean()))
                    assert row[f"{name}_exact{suffix}"] == float(right.all())


def test_greedy_generation_equals_token_by_token(backbone, scored):
    requests, evaluation, editor, params, _ = scored
    memory = KeyValues()
    with torch.no_grad(), editor.applied(backbone, params, evaluation):
        prefix = backbone.prefix(evaluation, *editor.sites, memory=memory)
        first = backbone.head(backbone.suffix(prefix, evaluation.predict_EKT, memory)).argmax(-1)
        drafted = greedy(backbone, evaluation, prefix, memory, first)
    for e in (0, 1, 4):
        for k, name in enumerate(evaluation.slots):
            request = requests[e]
            probe = request.edit if name == "rel" else request.probes[name]
            count = int(evaluation.target_mask_EKT[e, k].sum())
            batch, _ = run_one(backbone, editor, params, e, probe)
            tokens, generated = batch.tokens_EKS[0, 0].clone(), []
            for t in range(count):
                _, logits = run_one(backbone, editor, params, e, probe, tokens)
                generated.append(int(logits[batch.predict_EKT[0, 0, t]].argmax()))
                tokens[batch.predict_EKT[0, 0, t] + 1] = generated[-1]
            assert drafted[e, k, :count].tolist() == generated
    mask = evaluation.target_mask_EKT
    assert not torch.equal(drafted[mask], first[mask]), "no draft had to be revised: the test shows nothing"


def test_an_evaluation_in_parts_is_that_of_the_whole(backbone, scored, monkeypatch):
    _, evaluation, editor, params, _ = scored
    whole = evaluate(backbone, editor, params, evaluation)
    of_two = 2 * evaluation.tokens_EKS[0].numel() * backbone.hidden_size
    assert evaluation.num_edits > 2
    monkeypatch.setitem(metrics._VALUES_AT_ONCE, "cpu", of_two)
    monkeypatch.setitem(metrics._LOGITS_AT_ONCE, "cpu", 3 * backbone.vocabulary_size)
    assert evaluate(backbone, editor, params, evaluation) == whole


def test_an_edit_that_changes_nothing_leaves_locality_at_one(backbone, scored):
    _, evaluation, editor, params, _ = scored
    zeros = {name: torch.zeros_like(value) for name, value in params.items()}
    for row in evaluate(backbone, editor, zeros, evaluation):
        assert row["t_loc"] == row["m_loc_mmedit" if "m_loc_mmedit" in row else "t_loc_mmedit"] == 1.0
        assert row["rel"] == row["rel_before"]
        assert row["answer_before"] == row["answer_after"]


def test_what_is_not_asked_for_is_not_there(backbone, scored):
    _, evaluation, editor, params, rows = scored
    (row, *_) = evaluate(backbone, editor, params, evaluation, EvaluationConfig(generate=False, mmedit=False))
    assert not [name for name in row if "generated" in name or "mmedit" in name or "answer" in name]
    assert {name: row[name] for name in MAIN} == {name: rows[0][name] for name in MAIN}


def test_intervals_and_paired_test_equal_scipy():
    a = {f"e{i}": dict.fromkeys(MAIN, float(i % 3)) for i in range(20)}
    b = {f"e{i}": dict.fromkeys(MAIN, float(i % 4)) for i in range(1, 25)}
    values = [row["rel"] for row in a.values()]
    low, high = stats.t.interval(0.95, 19, loc=sum(values) / 20, scale=stats.sem(values))
    summary = summarize(list(a.values()))["rel"]
    assert (summary.low, summary.high, summary.n) == (pytest.approx(low), pytest.approx(high), 20)
    common = [f"e{i}" for i in range(1, 20)]
    expected = stats.ttest_rel([b[k]["rel"] for k in common], [a[k]["rel"] for k in common])
    difference = paired(a, b)["rel"]
    interval = expected.confidence_interval(0.95)
    assert difference.n == 19
    assert difference.p == pytest.approx(expected.pvalue)
    assert (difference.low, difference.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_degenerate_samples_have_no_false_certainty():
    assert math.isnan(estimate([]).mean)
    assert estimate([0.5]) == Estimate(0.5, 0.5, 0.5, 1)
    assert paired({"a": {"rel": 1.0}}, {"a": {"rel": 1.0}})["rel"].p == 1.0
    assert math.isnan(paired({"a": {"rel": 0.0}}, {"a": {"rel": 1.0}})["rel"].p)
    assert paired({"a": {"rel": 0.0}}, {"b": {"rel": 1.0}}) == {}
    # Every fact by as much, but for rounding: that is no spread.
    a = {f"e{i}": {"rel": 0.0, "fact": f"f{i // 3}"} for i in range(12)}
    b = {key: {"rel": value} for key, value in zip(a, [1.0, 0.0, 0.1] * 4, strict=True)}
    assert math.isnan(paired(a, b)["rel"].p)


def test_an_interval_over_facts_is_that_of_the_facts_where_each_has_as_many_edits():
    """With equal clusters, the cluster-robust interval of the mean is the ordinary one of the cluster means."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 3)) + rng.normal(size=(12, 1))
    facts = [f"fact-{i}" for i in range(12) for _ in range(3)]
    clustered = estimate(values.flatten().tolist(), facts)
    means = stats.t.interval(0.95, 11, values.mean(), stats.sem(values.mean(1)))
    assert (clustered.low, clustered.high) == pytest.approx(means)
    alone = estimate(values.flatten().tolist())
    assert alone.high - alone.low < clustered.high - clustered.low
    assert estimate([0.3, 0.9], ["same", "same"]).low == 0.6


def test_the_paired_test_compares_facts():
    rng = np.random.default_rng(1)
    a = {f"e{i}": {"rel": float(x), "fact": f"f{i // 2}"} for i, x in enumerate(rng.normal(size=20))}
    b = {key: {"rel": row["rel"] + float(rng.normal() + 0.4)} for key, row in a.items()}
    found = paired(a, b, ("rel",))["rel"]
    means = [
        [np.mean([rows[f"e{i}"]["rel"] for i in (2 * fact, 2 * fact + 1)]) for fact in range(10)] for rows in (a, b)
    ]
    assert found.p == pytest.approx(stats.ttest_rel(means[1], means[0]).pvalue)


def test_the_interval_of_a_share_is_a_share():
    found = summarize([{"rel": value, "seconds": 10 * value} for value in (1.0, 1.0, 1.0, 0.0)])
    assert found["rel"].low >= 0.0 and found["rel"].high == 1.0
    assert found["seconds"].high > 10.0
