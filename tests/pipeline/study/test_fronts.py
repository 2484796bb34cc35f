"""Fronts against calculations by hand and a direct jackknife, and the sentence that divides a gain."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

from odedit.errors import InputError
from pipeline.config import strict
from pipeline.report import attribution
from pipeline.run_folder.rows import EDITED, Row
from pipeline.study import comparisons, fronts, plots, spec, tables
from pipeline.study.spec import StudyConfig, arms

VALUES = {
    "title": "Fronts",
    "draw": None,
    "axes": {
        "editor": {"WISE": {}, "FT-L": {}},
        "objective": {"control": {}, "better": {}, "same": {}, "short": {}},
        "stop": {"early": {}, "late": {}},
    },
    "fronts": {"of": "objective", "over": ["stop"], "against": "control", "columns": ["m_gen"]},
    "plot": {"kind": "fronts"},
    "columns": ["m_gen", "m_loc_near"],
}
MEANS = {  # near locality and generality
    ("control", "early"): (0.9, 0.6),
    ("control", "late"): (0.7, 0.8),
    ("better", "early"): (0.95, 0.7),
    ("better", "late"): (0.75, 0.9),
    ("same", "early"): (0.9, 0.6),
    ("same", "late"): (0.7, 0.8),
    ("short", "early"): (0.8, 0.7),
    ("short", "late"): (0.7, 0.8),
}


def study(**changes: Any) -> StudyConfig:
    return strict.build(StudyConfig, VALUES | changes)


def rows_of(of: StudyConfig, spread: float = 0.02, facts: int = 12) -> dict[str, list[Row]]:
    """Two edits of each fact; the arms of `same` have the very rows of `control`."""
    made: dict[str, list[Row]] = {}
    for arm in arms(of):
        label = arm.labels["objective"]
        rng = np.random.default_rng(len(label) if label != "same" else len("control"))
        near, gen = MEANS[label, arm.labels["stop"]]
        made[arm.folder] = [
            {
                "edit_id": f"e{number}", "fact": f"f{number // 2}", "task": "vqa", "status": EDITED, "error": None,
                "stop_reason": "converged", "worst_nll": 0.1, "steps": 3, "seconds": 1.0,
                "m_gen": gen + spread * rng.normal(), "m_loc_near": near + spread * rng.normal(),
            }
            for number in range(2 * facts)
        ]  # fmt: skip
    return made


def test_a_front_is_the_upper_right_of_the_hull() -> None:
    points = [(0.2, 0.9), (0.5, 0.9), (0.7, 0.85), (0.9, 0.8), (0.6, 0.5), (0.95, 0.2), (0.7, 0.86)]
    assert fronts.front(points) == [(0.5, 0.9), (0.7, 0.86), (0.9, 0.8), (0.95, 0.2)]
    assert fronts.front([(0.5, 0.5)] * 2) == [(0.5, 0.5)]
    assert fronts.height(points, 0.1) == 0.9, "a front reaches to the left: more near locality is no harm"
    assert fronts.height(points, 0.8) == pytest.approx((0.86 + 0.8) / 2)
    for x in np.linspace(0.5, 0.95, 40):
        best = max(
            a * one[1] + (1 - a) * two[1]
            for one in points for two in points for a in np.linspace(0, 1, 201)
            if a * one[0] + (1 - a) * two[0] >= x - 1e-9
        )  # fmt: skip
        assert best <= fronts.height(points, float(x)) + 1e-9 and fronts.height(points, float(x)) - best < 0.006


def test_a_front_outside_is_told_from_one_that_is_not() -> None:
    of = study()
    rows = rows_of(of)
    found = fronts.levels(of, arms(of), rows)
    assert {(level.panel, level.label) for level in found} == {
        ((editor,), label) for editor in ("WISE", "FT-L") for label in ("better", "same", "short")
    }
    by_label = {
        label: [lv for lv in found if (lv.panel, lv.label) == (("WISE",), label)]
        for label in ("better", "same", "short")
    }
    assert [level.at for level in by_label["better"]] == ["late", "early"], "ascending near locality"
    assert fronts.verdict(by_label["better"]) == "outside"
    assert all(level.difference.mean == 0 == 1 - level.difference.p for level in by_label["same"])
    assert fronts.verdict(by_label["same"]) == "not told apart"
    assert fronts.verdict(by_label["short"]) == "not told apart, ends earlier"
    assert by_label["short"][1].difference is None
    text = fronts.to_markdown(of, found)
    assert "| WISE, better | outside | +.1" in text and "| WISE, short | not told apart, ends earlier |" in text
    lines = list(csv.DictReader(io.StringIO(fronts.to_csv(found))))
    assert len(lines) == len(found) and [line["difference"] == "" for line in lines].count(True) == 2


def test_the_test_is_the_jackknife_over_facts() -> None:
    """Every fact is left out of all means, the matched near locality included."""
    of = study(axes=VALUES["axes"] | {"editor": {"WISE": {}}})
    rows = rows_of(of, spread=0.1)
    by_labels = {(arm.labels["objective"], arm.labels["stop"]): rows[arm.folder] for arm in arms(of)}
    level = next(lv for lv in fronts.levels(of, arms(of), rows) if (lv.label, lv.at) == ("better", "early"))

    def difference(without: str | None) -> float:
        points = {}
        for labels, of_arm in by_labels.items():
            kept = [row for row in of_arm if row["fact"] != without]
            points[labels] = (np.mean([r["m_loc_near"] for r in kept]), np.mean([r["m_gen"] for r in kept]))
        x, y = points["control", "early"]
        (x0, y0), (x1, y1) = points["better", "late"], points["better", "early"]
        return float(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - y)

    facts = sorted({row["fact"] for row in rows[arms(of)[0].folder]})
    without = np.array([difference(each) for each in facts])
    error = math.sqrt((len(facts) - 1) / len(facts) * ((without - without.mean()) ** 2).sum())
    assert level.difference.mean == pytest.approx(difference(None))
    half = error * stats.t.ppf(0.975, len(facts) - 1)
    assert level.difference.high - level.difference.mean == pytest.approx(half)
    p = 2 * stats.t.sf(abs(difference(None)) / error, len(facts) - 1)
    assert level.difference.p == pytest.approx(p) and level.difference.p_holm >= level.difference.p


def test_only_records_that_all_arms_edited_count() -> None:
    of = study(axes=VALUES["axes"] | {"editor": {"WISE": {}}})
    rows = rows_of(of)
    whole = fronts.levels(of, arms(of), rows)
    folder = next(arm.folder for arm in arms(of) if arm.labels["objective"] == "better")
    rows[folder] = rows[folder][4:]
    fewer = {(lv.label, lv.at): lv for lv in fronts.levels(of, arms(of), rows)}
    assert fewer["better", "late"].difference.n == 20
    same = next(lv for lv in whole if (lv.label, lv.at) == ("same", "late"))
    assert fewer["same", "late"].difference.n == same.difference.n == 24


def test_the_picture_has_a_panel_for_each_editor_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    of = study()
    cells = tables.cells(of, arms(of), rows_of(of))
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "to_png", lambda picture: drawn.append(picture) or b"")
    plots.draw(of, cells)
    panels = drawn[0].axes
    assert [axes.get_ylabel() for axes in panels] == ["WISE\nQuestions", "FT-L\nQuestions"]
    lines = [[tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 1] for axes in panels]
    assert all(len(of_panel) >= 4 for of_panel in lines), "a front for each objective"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fronts": None}, "kind 'fronts' draws the study's section 'fronts'"),
        ({"fronts": VALUES["fronts"] | {"over": ["stopp"]}}, "Unknown axis 'stopp'. Did you mean 'stop'?"),
        ({"fronts": VALUES["fronts"] | {"against": "contol"}}, "fronts.against 'contol'. Did you mean 'control'?"),
        (
            {"attribution": {"axis": "objective", "native": "same", "control": "control", "objectives": ["bettr"]}},
            "attribution 'bettr'. Did you mean 'better'?",
        ),
    ],
)
def test_a_wrong_name_is_told(changes: Mapping[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        spec._check(study(**changes), {})


def test_a_gain_is_divided_into_that_of_the_rephrase_and_that_of_the_objective() -> None:
    """On the records that all three runs have; the parts add up to the whole."""
    wanted = {"axis": "objective", "native": "same", "control": "short", "objectives": ["better"]}
    of = study(attribution=wanted)
    rows = rows_of(of)
    (text,) = comparisons.attributed(of, arms(of), rows)
    assert text.startswith("better against same: m_gen +.1") and text.endswith("to the objective.")
    runs: dict[str, dict[str, Row]] = {"same": {}, "short": {}, "better": {}}
    for arm in arms(of):
        apart = f"{arm.labels['editor']}-{arm.labels['stop']}"
        runs.get(arm.labels["objective"], {}).update({f"{apart}-{r['edit_id']}": r for r in rows[arm.folder]})
    for part in attribution.parts(runs["same"], runs["short"], runs["better"]):
        assert part.rephrase.mean + part.objective.mean == pytest.approx(part.total.mean)
        assert part.total.n == 2 * 2 * 24
        for shown in (part.total, part.rephrase, part.objective):
            assert f"{'+' if shown.mean >= 0 else ''}{shown.mean:.3f}".replace("0.", ".", 1) in text
    assert comparisons.attributed(study(), arms(of), rows) == []
