"""Probes about what another record of the same model edits."""

from __future__ import annotations

from dataclasses import replace

from odedit import EditRequest, Probe, encode_requests, evaluate
from odedit.editors import load_editor
from odedit.evaluation.edited import Edited, judged_by_edits
from odedit.inputs.batch import check_probe_name
from tests.support.requests import TEMPLATE, make_picture

OWN = Probe("who owns this?", "anna hill", make_picture(0))
NEAR = Probe("Who  owns this?", "bob", make_picture(1), fact="owner of two")
PROBES = {
    "t_gen": replace(OWN, prompt="whose is this?"),
    "t_loc": Probe("what is the capital of arland?", "rome", fact="capital of arland"),
    "t_loc_near": Probe("who owns the two?", "bob", fact="owner of two"),
    "m_loc": Probe("which colour is it?", "red", make_picture(2)),
    "m_loc_near": NEAR,
    "blind_loc": Probe("who owns this?", "bob", fact="owner of one"),
}
REQUEST = EditRequest("one", OWN, probes=PROBES)
OTHER, ITSELF = ("two", "leo stone"), ("one", "anna hill")


def changed(edited: Edited) -> dict[str, Probe]:
    """Probes that are not those of the request, which keep their order; all others are the same objects."""
    probes = judged_by_edits(REQUEST, edited).probes
    assert len(probes) == len(PROBES)
    pairs = zip(PROBES.items(), probes.items(), strict=True)
    return {name: probe for (old, same), (name, probe) in pairs if name != old or probe is not same}


def test_a_probe_about_an_edited_fact_is_judged_by_its_new_answer():
    by_fact = changed(Edited(facts={"owner of two": OTHER, "owner of one": ITSELF}))
    assert by_fact == {
        "edited_gen_tlocnear": replace(PROBES["t_loc_near"], target="leo stone"),
        "edited_gen_mlocnear": replace(NEAR, target="leo stone"),
    }
    for name in by_fact:
        check_probe_name(name)


def test_a_probe_with_the_picture_and_question_of_a_record_is_judged_by_its_new_answer():
    assert NEAR.picture is not None
    for question in ("who owns this?", "WHICH colour is it?"):
        assert not changed(Edited(questions={("another picture", question): OTHER}))
    by_question = changed(Edited(questions={(NEAR.picture.key, "who owns this?"): OTHER}))
    assert by_question == {"edited_gen_mlocnear": replace(NEAR, target="leo stone")}


def test_a_probe_about_the_own_fact_is_judged_by_the_own_answer():
    request = replace(REQUEST, probes=PROBES | {"m_loc_near": replace(NEAR, fact="owner of one")})
    probes = judged_by_edits(request, Edited(facts={"owner of one": ITSELF})).probes
    assert probes["edited_gen_mlocnear"].target == "anna hill"
    assert probes["blind_loc"] is PROBES["blind_loc"], "the question without its picture names no fact"


def test_scores_of_a_judged_request(backbone):
    """The near probe leaves the mean of locality, and is scored as an answer."""
    request = judged_by_edits(REQUEST, Edited(facts={"owner of two": OTHER}))
    editor = load_editor("ftl")
    rows = []
    for each in (REQUEST, request):
        _, batch = encode_requests(backbone, [each], TEMPLATE)
        params = {name: 0 * value + 0.02 for name, value in editor.init(backbone, batch).items()}
        rows += evaluate(backbone, editor, params, batch)
    plain, judged = rows
    assert plain["m_loc"] == (plain["m_loc_far"] + plain["m_loc_near"]) / 2
    assert judged["m_loc"] == plain["m_loc_far"]
    assert not {"m_loc_near", "m_loc_far", "t_loc_near"} & judged.keys()
    assert {"edited_gen_mlocnear", "edited_gen_mlocnear_before", "edited_gen_tlocnear_generated_exact"} <= judged.keys()
