"""Names of slots and probes: which of them measure locality, and which a record may use."""

from __future__ import annotations

import pytest

from odedit import EditRequest, Probe
from odedit.edits import LOCALITY_SLOTS, REPHRASE_SLOTS, is_locality


def test_locality_is_told_by_the_kind_not_by_how_the_detail_begins():
    for name in ("t_loc", "m_loc", "m_loc_near", "own_loc_x", *LOCALITY_SLOTS):
        assert is_locality(name), name
    for name in ("edit", "rel", "t_gen", "m_gen_far", "t_gen_location", "t_gen_loc", "local_gen", *REPHRASE_SLOTS):
        assert not is_locality(name), name
