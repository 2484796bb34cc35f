"""Names of slots and probes, and batches split by length."""

from __future__ import annotations

import pytest
import torch

from odedit import EditRequest, Probe, encode_requests
from odedit.inputs.batch import (
    LOCALITY_SLOTS,
    REPHRASE_SLOTS,
    by_length,
    is_locality,
    rephrase_slots,
    unnumbered,
)
from tests.support.requests import TEMPLATE


def test_locality_depends_on_the_kind_not_on_the_detail():
    for name in ("t_loc", "m_loc", "m_loc_near", "own_loc_x", *LOCALITY_SLOTS):
        assert is_locality(name), name
    for name in ("edit", "rel", "t_gen", "m_gen_far", "t_gen_location", "t_gen_loc", "local_gen", *REPHRASE_SLOTS):
        assert not is_locality(name), name


def test_further_rephrases_are_numbered():
    assert rephrase_slots(2) == (*REPHRASE_SLOTS, "text_rephrase_2", "image_rephrase_2")
    assert {unnumbered(slot) for slot in rephrase_slots(12)} == set(REPHRASE_SLOTS)
    for name in ("text_rephrase_1", "text_rephrase_02", "near_locality_2", "rephrase_2", "edit"):
        with pytest.raises(
            ValueError, match=f"unknown supervision slot '{name}'; allowed: text_rephrase.*_2 and so on"
        ):
            EditRequest("a", Probe("p", "t"), {name: Probe("p", "t")})


def test_the_edit_itself_is_no_probe_of_a_request():
    with pytest.raises(ValueError, match="'rel' is the edit itself"):
        EditRequest("a", Probe("p", "t"), probes={"rel": Probe("p", "t")})


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], [[]]),
        ([7], [[0]]),
        ([56, 52, 24, 45], [[0, 1, 3], [2]]),
        ([56, 20, 24, 56, 22], [[0, 3], [1, 2, 4]]),
        ([56, 53, 56, 56], [[0, 1, 2, 3]]),  # too little is saved
        ([30, 30, 30], [[0, 1, 2]]),
    ],
)
def test_short_sequences_are_split_off_if_that_saves_enough(lengths, expected):
    assert by_length(lengths) == expected


def test_a_split_must_save_the_required_positions():
    assert by_length([56, 24, 50], at_least=26) == [[0, 2], [1]]
    assert by_length([56, 24, 50], at_least=33) == [[0, 1, 2]]


def test_parts_hold_every_real_position_once(backbone, requests_8):
    batch, _ = encode_requests(backbone, requests_8, TEMPLATE)
    parts = batch.parts()
    assert sorted(slot for part in parts for slot in part.slots) == sorted(batch.slots)
    for part in parts:
        whole, length = batch.select(part.slots), part.tokens_EKS.shape[2]
        assert length == int(part.real_EKS.sum(-1).max()) and not whole.real_EKS[..., length:].any()
        assert torch.equal(part.tokens_EKS, whole.tokens_EKS[..., :length])
