"""Names of columns: made from one table, and never shared by two probes."""

from __future__ import annotations

from itertools import permutations

import pytest

from odedit import encode_requests, evaluate, load_editor
from odedit.evaluation import columns
from odedit.evaluation.columns import ANSWER_COLUMNS, APPENDED, LOCALITY_COLUMNS, METRICS, column
from odedit.inputs.batch import RELIABILITY, check_probe_name
from tests.support.requests import TEMPLATE, make_request

WORDS = sorted(columns.words())


@pytest.mark.parametrize("word", WORDS)
def test_a_probe_may_not_take_the_name_of_a_column_made_from_another(word):
    for name in (f"t_gen_{word}", f"m_loc_{word}", f"m_loc_near_{word}", f"m_loc_{word}_near"):
        with pytest.raises(ValueError, match=f"unknown probe '{name}': '{word}' ends the name of a column"):
            check_probe_name(name)
    check_probe_name(f"{word.removesuffix('10')}_gen")
    check_probe_name("m_loc_farther")


@pytest.mark.parametrize("table", ["ANSWER_COLUMNS", "LOCALITY_COLUMNS"])
def test_a_column_is_added_in_one_table(table, backbone, monkeypatch):
    """It is written for every probe of its kind, and refused as the end of a probe's name."""
    check_probe_name("t_gen_first")
    with pytest.raises(ValueError, match="column of 't_gen': got ending 'first', expected before, exact, far"):
        column("t_gen", "first")
    editor = load_editor("ftl")
    _, batch = encode_requests(backbone, [make_request(0)], TEMPLATE)
    params = editor.init(backbone, batch)
    (plain,) = evaluate(backbone, editor, params, batch)

    monkeypatch.setitem(getattr(columns, table), "first", lambda *answers: float(answers[-1].counted_TR[0, 0]))
    (row,) = evaluate(backbone, editor, params, batch)
    answers = ("rel", "t_gen", "m_gen")
    added = [f"{probe}_first{when}" for probe in answers for when in ("", "_before")]
    if table == "LOCALITY_COLUMNS":
        added = ["t_loc_first", "m_loc_first", "m_loc_near_first", "m_loc_far_first"]
    assert sorted(row.keys() - plain.keys()) == sorted(added)
    assert {name: value for name, value in row.items() if name in plain} == plain
    with pytest.raises(ValueError, match="'first' ends the name of a column"):
        check_probe_name("t_gen_first")


def test_no_two_probes_have_a_column_in_common():
    details = ["", *(f"_{detail}" for detail in ("near", "mine", "befor", "exactly", *WORDS))]
    names = {f"{kind}_{what}{detail}" for kind in ("t", "m", "rel") for what in ("gen", "loc") for detail in details}
    allowed = [RELIABILITY, *filter(is_allowed, sorted(names))]
    assert len(allowed) == 1 + 3 * 2 * 5
    endings = [(), *((word,) for word in WORDS), *permutations(WORDS, 2), *permutations(WORDS, 3)]
    written = [column(name, *some) for name in allowed for some in endings]
    assert len(set(written)) == len(written)


def is_allowed(name):
    try:
        check_probe_name(name)
    except ValueError:
        return False
    return True


def test_no_ending_makes_the_column_of_another():
    """Nor does a score before the edit, or an interval of one."""
    for table in (ANSWER_COLUMNS, LOCALITY_COLUMNS):
        written = [column("t", *ending) for name in table for ending in ((name,), *((name, word) for word in APPENDED))]
        assert len(set(written)) == len(written)


def test_the_metrics_are_named_once():
    """Tables, plots, records and the search derive their lists from `METRICS`."""
    from odedit.data.fields import STANDARD_PROBES
    from odedit.evaluation.columns import FURTHER
    from odedit.evaluation.statistics import MAIN, SHOWN
    from pipeline.edits.states import PROBES
    from pipeline.report.page import LABELS
    from pipeline.study import states
    from tune.config import COMBINED

    assert tuple(METRICS) == MAIN == (RELIABILITY, *STANDARD_PROBES)
    assert tuple(LABELS) == SHOWN == (*MAIN, "m_loc_near", "m_loc_far", *FURTHER)
    assert [name for names in COMBINED.values() for name in names] == list(MAIN)
    assert states._MARKERS.keys() == states._NAMES.keys() == set(PROBES)
