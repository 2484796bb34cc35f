"""Scores against plain computations of one probe at a time, and statistics against scipy."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from odedit import (
    EditRequest,
    EvaluationConfig,
    Probe,
    encode_requests,
    evaluate,
    load_backbone,
    load_editor,
    paired,
    summarize,
)
from odedit.backbones.base import ends_of
from odedit.backbones.common.generation import EXTRA_TOKENS, NO_TOKEN, generate, until_end
from odedit.evaluation import columns
from odedit.evaluation.scores import _average_near_and_far, _averaged, answer_text, answers_target
from odedit.evaluation.statistics import MAIN, Estimate, estimate
from odedit.runtime.kv_cache import KVCache
from tests.support import tiny_models
from tests.support.limits import set_limits
from tests.support.requests import TEMPLATE, make_picture, make_request


@pytest.fixture(scope="module")
def scored(backbone):
    """Eight edits with random changes of weights, which change some answers and not others."""
    requests = [make_request(number, full=number != 5) for number in range(8)]
    _, evaluation = encode_requests(backbone, requests, TEMPLATE)
    editor = load_editor("ftl")
    params = editor.init(backbone, evaluation)
    generator = torch.Generator().manual_seed(0)
    params = {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    return requests, evaluation, editor, params, evaluate(backbone, editor, params, evaluation)


def run_one(backbone, editor, params, index, probe, tokens=None):
    """Logits of one probe for one edit, without a batch."""
    request = EditRequest("one", probe)
    _, batch = encode_requests(backbone, [request], TEMPLATE)
    if tokens is not None:
        batch.tokens_EKS[0, 0] = tokens
    own = {name: value[index : index + 1] for name, value in params.items()} if params else None
    with torch.no_grad():
        prefix = backbone.prefix(batch, editor.sites[0])
        if own is None:
            return batch, backbone.head(backbone.suffix(prefix))[0, 0]
        with editor.applied(backbone, own, batch):
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


def test_generated_answers_equal_token_by_token_decoding_under_edits(backbone, scored):
    """Up to their end or the bound, also where they are longer than their target."""
    requests, _, editor, params, _ = scored
    params = {name: torch.tensor([1.0, 3.0, 8.0]).view(-1, 1, 1) * value[:3] for name, value in params.items()}
    short = [
        replace(request, probes={name: replace(probe, target="Anna") for name, probe in request.probes.items()})
        for request in requests[:3]
    ]
    _, evaluation = encode_requests(backbone, short, TEMPLATE)
    kv_cache, drafted = KVCache(), {}
    read_EKT = evaluation.with_room(1, 0, backbone.max_positions).predict_EKT
    with torch.no_grad(), editor.applied(backbone, params, evaluation):
        prefix = backbone.prefix(evaluation, *editor.sites, kv_cache=kv_cache)
        first = backbone.head(backbone.suffix(prefix, read_EKT, kv_cache)).argmax(-1)
        for rest in (1, EXTRA_TOKENS):
            drafted[rest] = generate(backbone, evaluation, prefix, kv_cache.branch(), first, rest)
    lengths = []
    for e, request in enumerate(short):
        for k, name in enumerate(evaluation.slots):
            probe = request.edit if name == "rel" else request.probes[name]
            count = int(evaluation.target_mask_EKT[e, k].sum())
            longer = replace(probe, target=probe.target + " x" * EXTRA_TOKENS)
            batch, _ = run_one(backbone, editor, params, e, longer)
            tokens, generated = batch.tokens_EKS[0, 0].clone(), []
            for t in range(count + EXTRA_TOKENS):
                _, logits = run_one(backbone, editor, params, e, longer, tokens)
                generated.append(int(logits[batch.predict_EKT[0, 0, t]].argmax()))
                if generated[-1] in backbone.ends:
                    break
                tokens[batch.predict_EKT[0, 0, t] + 1] = generated[-1]
            for rest, made in drafted.items():
                drawn = until_end(made[e, k, : count + rest].tolist(), backbone.ends)
                assert drawn == until_end(generated[: count + rest], backbone.ends)
                lengths.append((len(drawn[0]) - count, drawn[1]))
    rests = {rest for rest, _ in lengths}
    assert min(rests) < 0 < 1 < max(rests), "no answer is shorter than its target, or none longer"
    assert {ended for _, ended in lengths} == {True, False}, "no answer is cut off, or all are"
    mask = evaluation.target_mask_EKT
    made = drafted[EXTRA_TOKENS][..., : mask.shape[-1]]
    assert not torch.equal(made[mask], first[..., :-1][mask]), "no draft had to be revised"


def test_an_answer_is_the_target_if_it_ends_there(backbone):
    def tokens(text: str) -> list[int]:
        return list(backbone.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    target, more, end = tokens(" anna hill"), tokens(" leo"), min(backbone.ends)
    for generated, expected, text in (
        ([*target, end, *more], True, "anna hill"),
        ([*tokens("anna hill"), end], True, "anna hill"),  # in words
        ([*target, *more, end], False, "anna hill leo"),
        (target, False, "anna hill ..."),
        ([*target, NO_TOKEN, end], False, "anna hill ..."),
        ([end], False, ""),
    ):
        assert (answers_target(backbone, generated, target), answer_text(backbone, generated)) == (expected, text)


@pytest.mark.parametrize("family", ["blip2", "minigpt4", "llava"])
def test_a_generated_answer_is_compared_to_its_end(family, backbone):
    """The target is the answer that transformers generates from the prompt, its beginning, or more than it."""
    model = backbone if family == "blip2" else load_backbone(family, "embedded")
    tokenizer, editor = model.processor.tokenizer, load_editor("ftl")
    seen = Probe("who owns this digit?", "?", make_picture(1))
    text_only = Probe("what is the capital of Arland?", "?")
    said = {name: library_answer(model, probe) for name, probe in (("rel", seen), ("t_gen", text_only))}
    words = said["rel"].split()
    assert len(words) > 1, "the beginning of the answer is all of it"
    for target, share, exact in ((said["rel"], 1.0, 1.0), (words[0], 1.0, 0.0), (f"{said['rel']} too", None, 0.0)):
        request = EditRequest(
            "a", replace(seen, target=target), probes={"t_gen": replace(text_only, target=said["t_gen"])}
        )
        _, batch = encode_requests(model, [request], TEMPLATE)
        (row,) = evaluate(model, editor, editor.init(model, batch), batch)
        assert row["answer_before"] == row["answer_after"] == said["rel"]
        assert row["answers"] == {name: {"before": text, "after": text} for name, text in said.items()}
        for when in ("", "_before"):
            assert row[f"rel_generated_exact{when}"] == exact
            assert row[f"t_gen_generated_exact{when}"] == row[f"t_gen_generated{when}"] == 1.0
            if share is None:
                assert 0 < row[f"rel_generated{when}"] < 1, "what stands behind the end counts as right"
            else:
                assert row[f"rel{when}"] == row[f"rel_generated{when}"] == share
    assert tokenizer.eos_token_id in model.ends


def test_answers_of_all_probes_are_cut_and_need_generation(backbone, monkeypatch):
    monkeypatch.setattr("odedit.evaluation.scores.MAX_ANSWER", 8)
    editor = load_editor("ftl")
    seen = Probe("who owns this digit?", "anna hill", make_picture(1))
    request = EditRequest("a", seen, probes={"m_gen": seen, "t_loc": Probe("what is the capital of Arland?", "x")})
    _, batch = encode_requests(backbone, [request], TEMPLATE)
    params = editor.init(backbone, batch)
    (row,) = evaluate(backbone, editor, params, batch)
    assert row["answers"].keys() == {"rel", "m_gen", "t_loc"}
    assert len(row["answer_after"]) > 8 and row["answers"]["rel"]["after"] == f"{row['answer_after'][:4]} ..."
    (silent,) = evaluate(backbone, editor, params, batch, EvaluationConfig(generate=False))
    assert not {"answers", "answer_after"} & silent.keys() and silent["rel"] == row["rel"]


@torch.no_grad()
def library_answer(model, probe):
    """Answer of transformers' own `generate` to the prompt without a target."""
    cell = model.sequence(probe, TEMPLATE)
    prompt = {"input_ids": torch.tensor([cell.tokens[: cell.first_target]])}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    whole, skipped = model.model, cell.first_target
    if probe.picture is not None:
        prompt["pixel_values"] = torch.from_numpy(model.processor.process(probe.picture).pixels)[None]
    elif model.family != "llava":
        whole = model.model.language_model
    tokens = whole.generate(**prompt, do_sample=False, max_new_tokens=12)[0].tolist()
    # Given embeddings, `generate` returns the answer without the prompt.
    answer = tokens[skipped:] if tokens[:skipped] == cell.tokens[:skipped] else tokens
    return model.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_locality_of_generated_answers_is_that_of_whole_answers(backbone, scored):
    _, evaluation, editor, params, _ = scored
    rows = evaluate(backbone, editor, params, evaluation, EvaluationConfig(mmedit=False))
    assert all(row["t_loc_generated"] == 1.0 for row in rows if row["t_loc_generated_exact"] == 1.0)
    parted = [row for row in rows for name in ("t_loc", "m_loc_near") if row.get(f"{name}_generated_exact") == 0.0]
    assert parted
    zeros = {name: torch.zeros_like(value) for name, value in params.items()}
    for row in evaluate(backbone, editor, zeros, evaluation):
        assert all(row[name] == 1.0 for name in row if "_loc" in name and name.endswith("generated_exact"))


def test_every_column_is_made_of_a_probe_and_declared_endings(backbone, scored):
    requests, _, _, _, rows = scored
    words = sorted(columns.words())
    endings = [(), *((word,) for word in words), *permutations(words, 2), *permutations(words, 3)]
    for request, row in zip(requests, rows, strict=True):
        owners = {name: [] for name in row if not name.startswith("answer")}
        for probe in ("rel", *request.probes):
            for some in endings:
                owners.get(columns.column(probe, *some), []).append(probe)
        assert all(len(probes) == 1 for probes in owners.values()), owners


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A LLaVA with LLaMA's tokenization: white space in front of a digit is a token of its own."""
    return load_backbone("llava", str(tiny_models.write("llava", tmp_path_factory.mktemp("llama"), with_pieces=True)))


def test_white_space_in_front_of_an_answer_is_generated_and_not_counted(llama_like, monkeypatch):
    model = llama_like
    tokenizer = model.processor.tokenizer
    white, seven, one, zero = tokenizer.convert_tokens_to_ids(["\u2581", "7", "1", "0"])
    requests = [
        EditRequest(answer, Probe("who?", answer, make_picture(0)), probes={"t_loc": Probe("who?", answer)})
        for answer in ("7", "10", "anna")
    ]
    supervision, batch = encode_requests(model, requests, TEMPLATE)
    for some in (supervision.select(("edit",)), batch.select(("rel",))):
        assert some.white_EK.flatten().tolist() == [1, 1, 0]
        # White space is trained and generated too.
        assert some.target_EKT[0, 0][some.target_mask_EKT[0, 0]].tolist() == [white, seven]
        assert some.target_EKT[1, 0][some.target_mask_EKT[1, 0]].tolist() == [white, one, zero]
        assert some.target_EKT[1, 0][some.counted_EKT[1, 0]].tolist() == [one, zero]
        assert int(some.prompt_EKS[0, 0].sum()) == int(some.predict_EKT[0, 0, 0]) + 1
    head = model.head

    def says(token):
        return lambda hidden: head(hidden).index_fill(-1, torch.tensor([token]), 1e4)

    editor = load_editor("ftl", {"sites": ["layers.1.ffn.out"]})
    for token, right, generated in ((white, [0.0, 0.0], [0.0, 0.0]), (seven, [1.0, 0.0], [1.0, 0.0])):
        monkeypatch.setattr(model, "head", says(token))
        rows = evaluate(model, editor, editor.init(model, batch), batch)
        assert [row["rel"] for row in rows[:2]] == right
        assert [row["rel_generated"] for row in rows[:2]] == generated
        assert all(row["rel_generated_exact"] == 0.0 for row in rows), "an answer that never ends"
        assert rows[0]["t_loc"] == rows[0]["t_loc_generated"] == 1.0
    monkeypatch.setattr(model, "head", head)
    kv_cache = KVCache()
    prefix = model.prefix(batch, "layers.1.ffn.out", kv_cache=kv_cache)
    read_EKT = batch.with_room(1, 0, model.max_positions).predict_EKT
    first = head(model.suffix(prefix, read_EKT, kv_cache)).argmax(-1)
    made = generate(model, batch, prefix, kv_cache, first)
    cell = model.sequence(requests[0].edit, TEMPLATE)
    tokens = model.processor.tokenizer("USER: <image>\nQuestion: who? Short answer: ASSISTANT:")["input_ids"]
    at = tokens.index(tiny_models.IMAGE)
    assert cell.tokens[: cell.first_target] == [*tokens[:at], *[tiny_models.IMAGE] * 16, *tokens[at + 1 :]]
    inputs = torch.tensor([cell.tokens[: cell.first_target]])
    pixels = torch.from_numpy(model.processor.process(make_picture(0)).pixels)[None]
    expected = model.model.generate(
        input_ids=inputs, pixel_values=pixels, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=6
    )
    assert made[0, 0, :6].tolist() == expected[0].tolist()[-6:]


def test_an_evaluation_in_parts_is_that_of_the_whole(backbone, scored, monkeypatch):
    _, evaluation, editor, params, _ = scored
    whole = evaluate(backbone, editor, params, evaluation)
    of_two = 2 * evaluation.tokens_EKS[0].numel() * backbone.hidden_size
    assert evaluation.num_edits > 2
    set_limits(monkeypatch, evaluated_values=of_two, evaluated_logits=3 * backbone.vocabulary_size)
    assert evaluate(backbone, editor, params, evaluation) == whole


def test_an_edit_that_changes_nothing_leaves_locality_at_one(backbone, scored):
    _, evaluation, editor, params, _ = scored
    zeros = {name: torch.zeros_like(value) for name, value in params.items()}
    for row in evaluate(backbone, editor, zeros, evaluation):
        assert row["t_loc"] == row["m_loc_mmedit" if "m_loc_mmedit" in row else "t_loc_mmedit"] == 1.0
        assert row["rel"] == row["rel_before"]
        assert row["answer_before"] == row["answer_after"]


@pytest.mark.parametrize("kind", ["gen", "loc"])
def test_numbered_probes_are_averaged_and_portability_over_all_hops(backbone, scored, kind):
    requests, _, editor, params, _ = scored
    asked = [requests[0].probes["t_loc"], requests[0].probes["m_loc"], requests[1].edit]
    rows = []
    for names in (
        (f"aa_{kind}", f"bb_{kind}", f"cc_{kind}"),
        ("port_gen_1hop_1", "port_gen_1hop_2", "port_gen_2hop_1")
        if kind == "gen"
        else ("x_loc_1", "x_loc_2", "y_loc_1"),
    ):
        request = replace(requests[0], probes=dict(zip(names, asked, strict=True)))
        _, evaluation = encode_requests(backbone, [request], TEMPLATE)
        own = {name: value[:1] for name, value in params.items()}
        rows.append(evaluate(backbone, editor, own, evaluation, EvaluationConfig(generate=False))[0])
    single, averaged = rows
    means = ("port_gen_1hop", "port_gen_2hop") if kind == "gen" else ("x_loc", "y_loc")
    endings = [name.removeprefix(f"aa_{kind}") for name in single if name.startswith(f"aa_{kind}")]
    for ending in endings:
        first, second, third = (single[f"{name}_{kind}{ending}"] for name in ("aa", "bb", "cc"))
        assert averaged[f"{means[0]}{ending}"] == (first + second) / 2
        assert averaged[f"{means[1]}{ending}"] == third
        if kind == "gen":
            assert averaged[f"port_gen{ending}"] == pytest.approx((first + second + third) / 3)
    assert len(endings) > 2 and not [name for name in averaged if "_1" in name.replace("_1hop", "")]
    assert kind == "gen" or len({single[f"{name}_loc_top10"] for name in ("aa", "bb", "cc")}) > 1


def test_a_probe_without_number_is_averaged_with_the_numbered_ones():
    shares = {"port_gen": 0.0, "port_gen_1hop": 0.25, "port_gen_1hop_2": 0.75, "m_loc_near": 1.0, "m_loc_near_2": 0.5}
    averaged = _averaged({name: {name: share, f"{name}_exact": 1.0} for name, share in shares.items()})
    means = {"port_gen": pytest.approx(1 / 3), "port_gen_1hop": 0.5, "m_loc_near": 0.75}
    assert averaged == {name: {name: mean, f"{name}_exact": 1.0} for name, mean in means.items()}


def test_only_the_near_probe_is_averaged_with_the_far_one():
    row = {"m_loc": 1.0, "m_loc_near": 0.5, "m_loc_near_whole": 0.25, "m_loc_near_hard": 0.0, "t_loc_nearby": 0.0}
    averaged = dict(row)
    _average_near_and_far(averaged)
    assert averaged == row | {"m_loc": 0.75, "m_loc_far": 1.0, "m_loc_whole": 0.25}


def test_a_number_after_a_main_metric_is_no_mean(backbone, scored):
    requests, _, editor, params, rows = scored
    request = replace(requests[0], probes=dict(requests[0].probes) | {"m_gen_2": requests[1].edit})
    _, evaluation = encode_requests(backbone, [request], TEMPLATE)
    own = {name: value[:1] for name, value in params.items()}
    (row,) = evaluate(backbone, editor, own, evaluation)
    assert row["m_gen"] == rows[0]["m_gen"] and "m_gen_2" in row


def test_scores_that_are_switched_off_are_not_written(backbone, scored):
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
    # Facts with equal differences, except for rounding: no spread.
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
    difference = paired(a, b, ("rel",))["rel"]
    means = [
        [np.mean([rows[f"e{i}"]["rel"] for i in (2 * fact, 2 * fact + 1)]) for fact in range(10)] for rows in (a, b)
    ]
    assert difference.p == pytest.approx(stats.ttest_rel(means[1], means[0]).pvalue)


def test_the_interval_of_a_share_is_a_share():
    summary = summarize([{"rel": value, "seconds": 10 * value} for value in (1.0, 1.0, 1.0, 0.0)])
    assert summary["rel"].low >= 0.0 and summary["rel"].high == 1.0
    assert summary["seconds"].high > 10.0


def test_answers_of_a_family_without_ends_end_at_the_tokenizers_end(backbone):
    tokenizer = backbone.processor.tokenizer
    older = SimpleNamespace(processor=backbone.processor)
    assert ends_of(older) == {tokenizer.eos_token_id} and ends_of(backbone) == backbone.ends
    tokens = tokenizer("anna hill", add_special_tokens=False)["input_ids"]
    assert answer_text(older, [*tokens, tokenizer.eos_token_id, *tokens]) == "anna hill"
