"""Names of slots and probes, and batches split by length."""

from __future__ import annotations

from enum import StrEnum
from itertools import permutations

import pytest
import torch

from odedit import EditRequest, Probe, encode_requests
from odedit.inputs import batch as batches
from odedit.inputs.batch import (
    LOCALITY_SLOTS,
    RELIABILITY,
    REPHRASE_SLOTS,
    Variant,
    by_length,
    check_probe_name,
    column,
    is_locality,
)
from tests.support.requests import TEMPLATE


def test_locality_depends_on_the_kind_not_on_the_detail():
    for name in ("t_loc", "m_loc", "m_loc_near", "own_loc_x", *LOCALITY_SLOTS):
        assert is_locality(name), name
    for name in ("edit", "rel", "t_gen", "m_gen_far", "t_gen_location", "t_gen_loc", "local_gen", *REPHRASE_SLOTS):
        assert not is_locality(name), name


@pytest.mark.parametrize("detail", list(Variant))
def test_a_probe_may_not_take_the_name_of_a_column_made_from_another(detail):
    for name in (f"t_gen_{detail}", f"m_loc_{detail}", f"m_loc_near_{detail}", f"m_loc_{detail}_near"):
        with pytest.raises(ValueError, match=f"unknown probe '{name}': '{detail}' ends the name of a column"):
            check_probe_name(name)
    check_probe_name(f"{detail.removesuffix('10')}_gen")
    check_probe_name("m_loc_farther")


def test_a_new_variant_is_refused_as_a_detail_as_soon_as_it_can_be_written(monkeypatch):
    check_probe_name("t_gen_first")
    with pytest.raises(ValueError, match="'first' is not a valid Variant"):
        column("t_gen", "first")
    monkeypatch.setattr(batches, "Variant", StrEnum("Variant", {"FIRST": "first", **Variant.__members__}))
    assert column("t_gen", "first") == "t_gen_first"
    with pytest.raises(ValueError, match="'first' ends the name of a column"):
        check_probe_name("t_gen_first")


def test_no_two_probes_have_a_column_in_common():
    details = ["", *(f"_{detail}" for detail in ("near", "mine", "befor", "exactly", *Variant))]
    names = {f"{kind}_{what}{detail}" for kind in ("t", "m", "rel") for what in ("gen", "loc") for detail in details}
    allowed = [RELIABILITY, *filter(is_allowed, sorted(names))]
    assert len(allowed) == 1 + 3 * 2 * 5
    variants = [(), *((variant,) for variant in Variant), *permutations(Variant, 2)]
    written = [column(name, *some) for name in allowed for some in variants]
    assert len(set(written)) == len(written)


def is_allowed(name):
    try:
        check_probe_name(name)
    except ValueError:
        return False
    return True


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
