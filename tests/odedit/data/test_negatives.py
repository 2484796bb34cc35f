"""Hard negatives: selection, rotation over the steps, and their terms of the objective."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from odedit import (
    EditRequest,
    InputError,
    Objective,
    ObjectiveConfig,
    Stopping,
    edit,
    encode_requests,
    evaluate,
    load_editor,
)  # fmt: skip
from odedit.backbones.common import same_things as same
from odedit.data.negatives import NegativePool
from odedit.inputs.batch import EDIT, REPHRASE, SUPERVISION_SLOTS, negative_slots, things_of
from odedit.objectives.contrast import Contrast
from tests.support.requests import TEMPLATE, make_picture, make_pool, make_request

CONTRAST = ObjectiveConfig(name="contrast", negatives=5, negatives_at_once=2)


@pytest.fixture(scope="module")
def pool(backbone):
    return make_pool(backbone, 5)


@pytest.fixture(scope="module")
def supervision(backbone, requests_8, pool):
    batch, _ = encode_requests(backbone, requests_8, TEMPLATE, negatives=pool)
    return batch


def pooled(features):
    return torch.stack([feature.float().mean(0) for feature in features.values()])


def marginal_relevance(pool, feature, count, taken=()):
    """Reference by the definition of maximal marginal relevance."""
    rows = pooled(pool.features)
    unit = functional.normalize(rows - rows.mean(0), dim=1)
    own = functional.normalize(feature.float().mean(0) - rows.mean(0), dim=0)
    keys, chosen = list(pool.features), []
    while len(chosen) < count:
        left = [n for n, key in enumerate(keys) if n not in chosen and key not in taken]
        gains = [
            float(unit[n] @ own) - max([float(unit[n] @ unit[c]) for c in chosen if unit[n] @ unit[c] > 0], default=0)
            for n in left
        ]
        chosen.append(left[gains.index(max(gains))])
    return [keys[n] for n in chosen]


def test_the_nearest_pictures_that_are_unlike_one_another_are_taken(backbone, pool):
    request = make_request(0)
    request = replace(request, supervision={}, replaced="old answer")
    feature = backbone.image_features([request.edit.picture])[request.edit.picture.key]
    probes = pool.probes(request, feature)
    assert [probe.picture.key for probe in probes] == marginal_relevance(pool, feature, 5)
    assert {(probe.prompt, probe.target) for probe in probes} == {(request.edit.prompt, "old answer")}
    nearest = max(pool.features, key=lambda key: float(functional.cosine_similarity(
        pool.features[key].float().mean(0) - pooled(pool.features).mean(0),
        feature.float().mean(0) - pooled(pool.features).mean(0), dim=0)))  # fmt: skip
    assert probes[0].picture.key == nearest


def test_the_records_own_negative_comes_first_and_nothing_of_the_record_is_taken_from_the_pool(backbone, pool):
    request = make_request(0)
    scored = make_picture(700)
    request = replace(request, probes={**request.probes, "m_loc_near": replace(request.edit, picture=scored)})
    feature = backbone.image_features([request.edit.picture])[request.edit.picture.key]
    keys = [probe.picture.key for probe in pool.probes(request, feature)]
    assert keys[0] == request.supervision["near_locality"].picture.key
    assert keys[1:] == marginal_relevance(pool, feature, 4, taken={scored.key})
    assert {probe.target for probe in pool.probes(request, feature)} == {request.edit.target}, "no answer is known"


def test_no_thing_whose_answer_is_scored_is_a_negative(backbone):
    """Neither by its entity nor by its fact; things of other edits and unnamed ones are."""
    features = backbone.image_features([make_picture(number) for number in range(700, 706)])
    keys = list(features)
    things = {keys[0]: things_of("city of four", "four"), keys[1]: things_of("owner of six", "six")}
    things |= {keys[2]: things_of("owner of four", "five"), keys[3]: things_of(None, "seven")}
    named = NegativePool(features, 6, things)
    request = make_request(0)
    near = replace(request.probes["m_loc_near"], fact="owner of four", entity="four")
    probes = {**request.probes, "m_loc_near": near}
    probes["m_gen"] = replace(request.probes["m_gen"], entity="six")
    request = replace(request, supervision={}, probes=probes)
    feature = backbone.image_features([request.edit.picture])[request.edit.picture.key]
    drawn = {probe.picture.key for probe in named.probes(request, feature)}
    assert drawn == set(keys) - {keys[0], keys[2]}, "the thing of an answer that must change is no reason"
    unnamed = replace(request, probes={name: replace(p, fact=None, entity=None) for name, p in probes.items()})
    assert {probe.picture.key for probe in named.probes(unnamed, feature)} == set(keys)


def test_a_picture_of_the_same_thing_is_trained_to_the_new_answer(backbone, requests_8, monkeypatch):
    """As a further rephrase: the nearest about which the unedited model gives the replaced answer."""
    pool = NegativePool(make_pool(backbone, 5).features, 5, positives=1)
    requests = [replace(request, replaced="old") for request in requests_8[:2]]
    feature = {key: value for request in requests for key, value in
               backbone.image_features([request.edit.picture]).items()}  # fmt: skip
    nearest = [[probe.picture.key for probe in pool.candidates(r, feature[r.edit.picture.key])] for r in requests]
    assert all(len(keys) == len(pool.features) for keys in nearest)
    asked = []

    def answered(model, edit_ids, probes, features, *rest):
        asked.extend(probe.target for of_one in probes for probe in of_one)
        return [[of_one[2].picture, of_one[5].picture] if n == 0 else [] for n, of_one in enumerate(probes)]

    monkeypatch.setattr(same, "same_things", answered)
    batch, _ = encode_requests(backbone, requests, TEMPLATE, negatives=pool)
    assert set(asked) == {"old"} and batch.slots[-7:] == (REPHRASE, "rephrase_2", *negative_slots(5))
    first = batch.slots.index("rephrase_2")
    assert batch.present_EK[:, first].tolist() == [True, False]
    edit_column = batch.slots.index(EDIT)
    assert torch.equal(batch.tokens_EKS[0, first], batch.tokens_EKS[0, edit_column]), "the new answer"
    picture = batch.features_NLD[batch.picture_EK[0, first]]
    assert torch.equal(picture, pool.features[nearest[0][2]])
    objective = Objective(replace(CONTRAST, positives=1))
    assert objective.slots(load_editor("ftl"), batch)[:3] == (EDIT, REPHRASE, "rephrase_2")
    monkeypatch.undo()
    unknown = [replace(request, replaced=None) for request in requests]
    batch, _ = encode_requests(backbone, unknown, TEMPLATE, negatives=pool)
    assert batch.slots[-6:] == (REPHRASE, *negative_slots(5))


def test_the_same_thing_is_what_the_unedited_model_answers_alike(backbone, requests_8):
    """Against greedy generation; an answer that it gives about most pictures tells nothing."""
    request = requests_8[0]
    pictures = [make_picture(number) for number in range(700, 706)]
    features = backbone.image_features(pictures)
    said = {}
    for picture in pictures:
        one = replace(request, edit=replace(request.edit, picture=picture), probes={}, supervision={})
        _, batch = encode_requests(backbone, [one], TEMPLATE)
        editor = load_editor("ftl")
        (row,) = evaluate(backbone, editor, editor.init(backbone, batch), batch)
        said[picture.key] = row["answer_before"]
    for answer in dict.fromkeys(said.values()):
        asked = [[replace(request.edit, picture=picture, target=answer) for picture in pictures]]
        (found,) = same.same_things(backbone, [request.edit_id], asked, features, TEMPLATE)
        alike = [picture.key for picture in pictures if said[picture.key].startswith(answer.removesuffix(" ..."))]
        if not answer.endswith("..."):
            assert [picture.key for picture in found] == ([] if len(alike) > 3 else alike), answer


def test_a_negative_of_the_same_thing_takes_no_turn(supervision):
    objective = Objective(CONTRAST)
    batch = supervision.select(objective.slots(load_editor("ftl"), supervision))
    read_EK = batch.present_EK.clone()
    read_EK[0, 3] = read_EK[0, 5] = False
    columns = [
        objective.columns_in_turn(batch.slots, read_EK, torch.full((batch.num_edits,), step))[0, 2:].tolist()
        for step in range(3)
    ]
    assert columns == [[2, 4], [6, 2], [4, 6]]


def test_a_small_pool_gives_what_it_has(backbone, requests_8):
    small = NegativePool(backbone.image_features([make_picture(700)]), 5)
    batch, _ = encode_requests(backbone, requests_8, TEMPLATE, negatives=small)
    negatives = batch.select(negative_slots(5))
    for row, request in zip(negatives.present_EK.sum(1).tolist(), requests_8, strict=True):
        assert row == 1 + ("near_locality" in request.supervision)
    none = NegativePool({}, 5)
    batch, _ = encode_requests(backbone, requests_8, TEMPLATE, negatives=none)
    assert batch.select(negative_slots(5)).present_EK.sum(1).max() == 1


def test_every_negative_has_its_turn(supervision):
    objective = Objective(CONTRAST)
    batch = supervision.select(objective.slots(load_editor("ftl"), supervision))
    assert batch.slots == (EDIT, REPHRASE, *negative_slots(5))
    seen = []
    for step in range(5):
        steps_E = torch.full((batch.num_edits,), step)
        columns_EK = objective.columns_in_turn(batch.slots, batch.present_EK, steps_E)
        assert columns_EK[:, :2].tolist() == [[0, 1]] * batch.num_edits
        seen += columns_EK[0, 2:].tolist()
        turn = objective.in_turn(batch, step)
        assert turn.slots == batch.slots[:4]
        for row in range(batch.num_edits):
            alone = batch.select([batch.slots[column] for column in columns_EK[row].tolist()])
            assert torch.equal(turn.picture_EK[row], alone.picture_EK[row])
            assert torch.equal(turn.tokens_EKS[row], alone.tokens_EKS[row])
    assert seen == [2, 3, 4, 5, 6, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("steps", "seen"), [(0, 2), (1, 4), (2, 5), (9, 5)])
def test_what_no_step_gets_to_see_is_not_computed(backbone, supervision, monkeypatch, steps, seen):
    editor, stopping = load_editor("ftl", {"learning_rate": 1e-3}), Stopping(max_steps=steps, worst_token_nll=1e-9)
    shown, prefix_of = [], backbone.prefix
    monkeypatch.setattr(backbone, "prefix", lambda batch, *sites, **how: (
        shown.append(batch.slots), prefix_of(batch, *sites, **how))[1])  # fmt: skip
    results = edit(backbone, editor, Objective(CONTRAST), supervision, stopping)
    assert shown == [(EDIT, REPHRASE, *negative_slots(seen))]
    within = Contrast.slots_within
    monkeypatch.setattr(Contrast, "slots_within", lambda self, slots, steps: tuple(slots))
    monkeypatch.setattr(Contrast, "slots_at_once", lambda self, slots: within(self, slots, 1))
    for result, whole in zip(results, edit(backbone, editor, Objective(CONTRAST), supervision, stopping), strict=True):
        assert result.steps == whole.steps == steps
        for name, curve in whole.curves.items():
            assert result.curves[name] == pytest.approx(curve, rel=1e-4, abs=1e-6), name
        for name, value in whole.params.items():
            assert torch.allclose(result.params[name], value, atol=1e-6), name


def test_where_none_takes_turns_all_are_seen_at_once(supervision):
    """For any number of negatives in the batch."""
    objective = Objective(replace(CONTRAST, negatives=2))
    slots = objective.slots(load_editor("ftl"), supervision)
    assert slots[2:] == negative_slots(5)
    assert objective.slots_at_once(slots) == objective.slots_within(slots, 1) == slots


def test_a_negative_is_never_seen_twice_in_a_step(backbone, requests_8):
    """If the record's own near picture is the only negative."""
    batch, _ = encode_requests(backbone, requests_8, TEMPLATE, negatives=NegativePool({}, 5))
    objective = Objective(CONTRAST)
    batch = batch.select(objective.slots(load_editor("ftl"), batch))
    turn = objective.in_turn(batch, 3)
    assert turn.present_EK[:, 3:].sum() == 0 == turn.target_mask_EKT[:, 3:].sum()
    assert torch.equal(turn.picture_EK[:, 2], batch.picture_EK[:, 2])


def test_what_only_the_editors_own_terms_read_weighs_nothing(backbone, supervision):
    """WISE's margin losses read the record's three unrelated prompts; R_loc reads none of them."""
    wise = load_editor("wise", {"site": "layers.2.ffn.in"})
    objective = Objective(replace(CONTRAST, own_weight=1.0))
    batch = supervision.select(objective.slots(wise, supervision))
    states = torch.zeros(*batch.target_EKT.shape, backbone.hidden_size)
    weights = dict(zip(batch.slots, objective.weights_of_locality(backbone, batch, states)[0].tolist(), strict=True))
    assert (weights["text_locality"], weights["image_locality"], weights["near_locality"]) == (0, 0, 0)
    runs = [
        edit(backbone, wise, Objective(replace(CONTRAST, own_weight=own)), supervision, Stopping(max_steps=2))
        for own in (0.0, 1e-9)
    ]
    for one, other in zip(*runs, strict=True):
        assert one.curves["loc"] == pytest.approx(other.curves["loc"], rel=1e-3, abs=1e-6)


def test_who_has_fewer_negatives_sees_those_more_often(supervision):
    objective = Objective(CONTRAST)
    batch = supervision.select(objective.slots(load_editor("ftl"), supervision))
    present_EK = batch.present_EK.clone()
    present_EK[0, 5:] = present_EK[1, 2:] = False
    steps_E = torch.full((batch.num_edits,), 1)
    columns_EK = objective.columns_in_turn(batch.slots, present_EK, steps_E)
    assert columns_EK[0, 2:].tolist() == [4, 2]
    assert columns_EK[1, 2:].tolist() == [2, 2], "which it has not, so that it counts for nothing"


def test_the_terms_are_their_formulas(backbone, supervision):
    config = replace(CONTRAST, negatives_at_once=5, generality_weight=0.5, locality_weight=3.0)
    objective, editor = Objective(config), load_editor("ftl")
    batch = supervision.select(objective.slots(editor, supervision))
    prefix = backbone.prefix(batch, *editor.sites)
    params = {name: value + 0.02 for name, value in editor.init(backbone, batch).items()}
    with torch.no_grad():
        base = backbone.suffix(prefix, batch.predict_EKT)
        with editor.applied(backbone, params, batch) as trace:
            hidden = backbone.suffix(prefix, batch.predict_EKT)
    weight_EK = objective.weights_of_locality(backbone, batch, base)
    unedited = objective.unedited(backbone, batch, base, weight_EK)
    terms = objective(backbone, editor, params, trace, batch, hidden, unedited)
    log_p, log_q = backbone.head(hidden).log_softmax(-1), backbone.head(base).log_softmax(-1)
    nll = -log_p.gather(-1, batch.target_EKT.unsqueeze(-1)).squeeze(-1)
    for e in range(batch.num_edits):
        masks = batch.target_mask_EKT[e]
        total = nll[e, 0][masks[0]].mean() + 0.5 * nll[e, 1][masks[1]].mean()
        for k in range(2, len(batch.slots)):
            if batch.present_EK[e, k]:
                kl = (log_p[e, k].exp() * (log_p[e, k] - log_q[e, k])).sum(-1)[masks[k]].mean()
                is_same = bool((log_q[e, k].argmax(-1) == batch.target_EKT[e, k])[masks[k]].all())
                total = total + (0.0 if is_same else 3.0 * 2.0) * kl
        assert float(terms.total[e]) == pytest.approx(float(total), rel=1e-4)
        worst = max(float(nll[e, k][masks[k]].max()) for k in (0, 1))
        assert float(terms.worst_trained_nll[e]) == pytest.approx(worst, rel=1e-4)
        assert float(terms.worst_nll[e]) == pytest.approx(float(nll[e, 0][masks[0]].max()), rel=1e-4)
    assert not terms.penalty.any()


def test_a_negative_that_is_answered_with_what_is_replaced_does_not_count(backbone, supervision, monkeypatch):
    """It shows the same thing. One token that differs makes it a negative."""
    objective = Objective(CONTRAST)
    batch = supervision.select(objective.slots(load_editor("ftl"), supervision))
    states = torch.zeros(*batch.target_EKT.shape, backbone.hidden_size)

    answers = batch.answers(tuple(slot for slot in batch.slots if slot in negative_slots(5)))
    tokens = iter(answers.tokens_M.tolist())

    def sure(states_MD):
        logits = torch.zeros(len(states_MD), backbone.vocabulary_size)
        for row in logits:
            row[next(tokens)] = 100.0
        return logits

    monkeypatch.setattr(backbone, "head", sure)
    weights = objective.weights_of_locality(backbone, batch, states)
    assert len(answers.tokens_M) > 32 and next(tokens, None) is None, "in more than one part, each token once"
    assert weights[:, 2:][batch.present_EK[:, 2:]].abs().max() < 1e-6
    monkeypatch.setattr(backbone, "head", lambda states_MD: torch.zeros(len(states_MD), backbone.vocabulary_size))
    weights = objective.weights_of_locality(backbone, batch, states)
    assert (weights[:, :2] == 0).all(), "the edit and its rephrase are to change"
    assert set(weights[:, 2:][batch.present_EK[:, 2:]].tolist()) == {2.0}

    last = iter([*answers.tokens_M[:-1].tolist(), int(answers.tokens_M[-1]) + 1])
    monkeypatch.setattr(backbone, "head", lambda states_MD: functional.one_hot(
        torch.tensor([next(last) for _ in states_MD]), backbone.vocabulary_size + 1).float())  # fmt: skip
    weights = objective.weights_of_locality(backbone, batch, states)
    assert weights.sum() == 2.0 == weights[batch.present_EK][-1], "the last token of the last negative differs"


def test_an_edit_stops_when_its_rephrase_is_learned_as_well(backbone, pool):
    batch, _ = encode_requests(backbone, [make_request(0)], TEMPLATE, negatives=pool)
    alone = batch.select([slot for slot in batch.slots if slot != REPHRASE])
    editor = load_editor("ftl", {"learning_rate": 3e-3})
    objective, stopping = Objective(replace(CONTRAST, locality_weight=0.0)), Stopping(100, 0.5)
    (result,), (without,) = (edit(backbone, editor, objective, one, stopping) for one in (batch, alone))
    assert result.stop_reason == without.stop_reason == "worst_token_nll"
    assert min(result.curves["worst_nll"][:-1]) <= 0.5, "the edit itself was there before"
    assert min(without.curves["worst_nll"][:-1]) > 0.5
    (untrained,) = edit(backbone, editor, Objective(replace(objective.config, generality_weight=0.0)), batch, stopping)
    assert untrained.steps == without.steps, "what is not trained is not waited for"


def test_without_a_pool_it_says_what_is_missing(backbone, requests_8):
    batch, _ = encode_requests(backbone, requests_8, TEMPLATE)
    assert batch.slots == SUPERVISION_SLOTS
    with pytest.raises(InputError, match="reads hard negatives.*pass a NegativePool to encode_requests"):
        edit(backbone, load_editor("ftl"), Objective(CONTRAST), batch, Stopping(max_steps=2))


def test_both_rephrases_are_one_sequence(backbone, supervision, requests_8):
    """The text of one rephrase and the picture of the other; a missing one is replaced by the edit's own."""
    rephrase = supervision.select([REPHRASE])
    assert rephrase.present_EK.all()
    for row, request in enumerate(requests_8):
        text, image = request.supervision["text_rephrase"], request.supervision.get("image_rephrase")
        one = replace(request, supervision={"text_rephrase": replace(text, picture=(image or text).picture)})
        alone = encode_requests(backbone, [one], TEMPLATE)[0].select(["text_rephrase"])
        assert torch.equal(
            rephrase.target_EKT[row][rephrase.target_mask_EKT[row]], alone.target_EKT[alone.target_mask_EKT]
        )
        assert torch.equal(rephrase.tokens_EKS[row][rephrase.real_EKS[row]], alone.tokens_EKS[alone.real_EKS])
        mine, expected = (b.features_NLD[b.picture_EK[e, 0]] for b, e in ((rephrase, row), (alone, 0)))
        assert torch.allclose(mine, expected, atol=1e-5)
    request = make_request(0)
    text, image = (request.supervision[slot] for slot in ("text_rephrase", "image_rephrase"))
    assert replace(request, supervision={}).rephrase() is None
    assert replace(request, supervision={"text_rephrase": text}).rephrase() == text
    assert replace(request, supervision={"image_rephrase": image}).rephrase() == replace(
        request.edit, picture=image.picture
    )


def test_what_cannot_take_turns_says_so(backbone, supervision):
    wise = load_editor("wise", {"site": "layers.2.ffn.in", "clamp": None, "mask": "columns"})
    with pytest.raises(InputError, match="reads other pictures in each step"):
        edit(backbone, wise, Objective(CONTRAST), supervision, Stopping(max_steps=2))
    whole = Objective(replace(CONTRAST, negatives_at_once=5))
    assert not any(result.error for result in edit(backbone, wise, whole, supervision, Stopping(max_steps=2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"negatives_at_once": 0}, "a whole number >= 1"), ({"negatives": 1}, r"at least negatives_at_once \(2\)")],
)
def test_numbers_of_negatives_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(name="contrast", **settings)


def test_text_without_a_picture_has_no_negatives(backbone, pool):
    request = make_request(0)
    bare = EditRequest("text", replace(request.edit, picture=None), {}, {})
    batch, _ = encode_requests(backbone, [request, bare], TEMPLATE, negatives=pool)
    assert batch.select(negative_slots(5)).present_EK.tolist() == [[True] * 5, [False] * 5]
