"""Tables and pictures of studies: means, differences and corrected tests, against SciPy and calculations by hand."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from odedit.evaluation import statistics
from pipeline.config import strict
from pipeline.report import formatting
from pipeline.report.differences import Difference
from pipeline.run_folder.rows import EDITED, FAILED, SKIPPED, Row
from pipeline.study import comparisons, fronts, plots, tables
from pipeline.study.spec import Arm, StudyConfig, arms

TWO_AXES = {
    "editor": {"WISE": {}, "FT-L": {}},
    "objective": {"native": {}, "ODEdit": {}, "other": {}},
}


def study(**changes: Any) -> StudyConfig:
    values = {"title": "t", "axes": TWO_AXES, "baseline": {"objective": "native"}, "columns": ["rel", "m_loc"]}
    return strict.build(StudyConfig, values | changes)


def row(number: int, task: str, status: str = EDITED, **columns: float) -> Row:
    fact = f"fact {number // 2}"  # two edits each
    fixed = {"edit_id": f"{task}-{number}", "fact": fact, "task": task, "status": status, "stop_reason": "converged"}
    return fixed | {"worst_nll": 0.1, "steps": 5, "seconds": 2.0} | columns


def rows_of(study: StudyConfig, num_edits: int = 16) -> dict[str, list[Row]]:
    """Random rows of every arm; under ODEdit `rel` is much better, and nothing else differs but by noise."""
    rng = np.random.default_rng(3)
    made = {}
    for arm in arms(study):
        better = 5.0 * (arm.labels.get("objective") == "ODEdit")
        made[arm.folder] = [
            row(number, task, rel=better + rng.normal(), m_loc=rng.normal())
            for task in ("vqa", "caption")
            for number in range(num_edits)
        ]
    return made


def column(rows: list[Row], task: str, name: str) -> np.ndarray:
    return np.array([r[name] for r in rows if r["task"] == task and r["status"] == EDITED])


def of_facts(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 2).mean(axis=1)


def holm(p: list[float]) -> list[float]:
    """Holm's correction: p times the number of remaining hypotheses, made monotonous."""
    order = np.argsort(p)
    adjusted = [min(1.0, p[i] * (len(p) - place)) for place, i in enumerate(order)]
    result = [0.0] * len(p)
    for place, i in enumerate(order):
        result[i] = max(adjusted[: place + 1])
    return result


def test_means_differences_and_tests_equal_those_of_scipy() -> None:
    config = study()
    rows = rows_of(config)
    found = tables.cells(config, arms(config), rows)
    assert [(cell.arm.name, cell.task) for cell in found[:2]] == [("WISE, native", "vqa"), ("WISE, ODEdit", "vqa")]
    assert len(found) == 6 * 2
    for task in ("vqa", "caption"):
        for name in ("rel", "m_loc"):
            mine = [cell for cell in found if cell.task == task]
            p_values = []
            compared = []
            for cell in mine:
                values = column(rows[cell.arm.folder], task, name)
                assert cell.means[name].mean == pytest.approx(values.mean())
                # All facts have two edits, so the clustered interval equals the ordinary one of the facts' means.
                facts = of_facts(values)
                interval = stats.t.interval(0.95, len(facts) - 1, loc=facts.mean(), scale=stats.sem(facts))
                assert (cell.means[name].low, cell.means[name].high) == pytest.approx(interval)
                if cell.arm.labels["objective"] == "native":
                    assert not cell.differences
                    continue
                base = column(rows[f"{cell.arm.labels['editor']}_native"], task, name)
                test = stats.ttest_rel(facts, of_facts(base))
                assert cell.differences[name].mean == pytest.approx((values - base).mean())
                assert cell.differences[name].p == pytest.approx(test.pvalue)
                interval = test.confidence_interval()
                got = (cell.differences[name].low, cell.differences[name].high)
                assert got == pytest.approx((interval.low, interval.high))
                p_values.append(test.pvalue)
                compared.append(cell)
            assert [cell.differences[name].p_holm for cell in compared] == pytest.approx(holm(p_values)) and len(
                compared
            ) == 4


def test_holm_on_the_example_of_a_textbook_and_without_a_test() -> None:
    found = statistics.holm({"a": 0.01, "b": 0.005, "c": 0.03, "d": 0.04, "e": math.nan})
    assert [found[name] for name in "abcd"] == pytest.approx([0.03, 0.02, 0.06, 0.06]) and math.isnan(found["e"])


def test_the_table_for_machines_has_a_line_per_arm_task_and_column() -> None:
    config = study()
    rows = rows_of(config, num_edits=4)
    found = tables.cells(config, arms(config), rows)
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(config, found))))
    keys = {(line["editor"], line["objective"], line["task"], line["column"]) for line in lines}
    columns = {"rel", "m_loc", "worst_nll", "steps", "seconds"}
    assert len(lines) == len(keys) == 6 * 2 * len(columns) and {line["column"] for line in lines} == columns
    cells = {(cell.arm.name, cell.task): cell for cell in found}
    for line in lines:
        cell = cells[f"{line['editor']}, {line['objective']}", line["task"]]
        name = line["column"]
        assert float(line["mean"]) == pytest.approx(cell.means[name].mean, rel=1e-4)
        assert float(line["low"]) <= float(line["mean"]) <= float(line["high"]) and line["n"] == "4"
        if name in cell.differences:
            assert float(line["p"]) == pytest.approx(cell.differences[name].p, rel=1e-4)
            assert float(line["p_holm"]) == pytest.approx(cell.differences[name].p_holm, rel=1e-4)
        else:
            assert line["p"] == line["p_holm"] == line["baseline_difference"] == ""


def test_only_what_is_significant_after_correction_is_marked() -> None:
    config = study()
    rows = rows_of(config)
    found = tables.cells(config, arms(config), rows)
    text = tables.to_markdown(config, found, config.columns)
    assert text.count("**Questions**") == text.count("**Captions**") == 1
    body = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    header, lines = body[0], [line for line in body if line[0].strip() in TWO_AXES["editor"]]
    assert [name.strip() for name in header] == ["editor", "objective", "n", "stop", "rel", "m_loc"]
    assert len(lines) == 12
    for line, cell in zip(lines, found, strict=True):
        for text_of, name in zip(line[4:], ("rel", "m_loc"), strict=True):
            is_marked = any(sign in text_of for sign in "▲▼")
            assert is_marked == (name in cell.differences and cell.differences[name].p_holm < 0.05)
            assert "▲" not in text_of or cell.differences[name].mean > 0
    assert sum("▲" in line[4] for line in lines) == 4, "rel under ODEdit, of two editors on two tasks"


def test_a_difference_that_the_correction_takes_back_is_not_marked() -> None:
    cell = tables.cells(study(), arms(study()), rows_of(study()))[1]
    for p_holm, is_marked in ((0.06, False), (0.04, True)):
        change = Difference(-0.2, -0.3, -0.1, p=0.02, n=16, p_holm=p_holm)
        text = tables._figure(replace(cell, differences={"rel": change}), "rel")
        assert text.endswith("▼") == is_marked


def test_failed_and_skipped_records_count() -> None:
    config = study(baseline={})
    first, *others = arms(config)
    rows = {arm.folder: [row(0, "vqa", rel=1.0, m_loc=0.5), row(1, "vqa", FAILED)] for arm in others}
    rows[first.folder] = [row(0, "vqa", FAILED), row(1, "vqa", SKIPPED)]
    found = tables.cells(config, [first, *others], rows)
    assert [(cell.n, cell.failed, cell.skipped) for cell in found[:2]] == [(0, 1, 1), (1, 1, 0)]
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(config, found))))
    lost = [line for line in lines if (line["editor"], line["objective"]) == ("WISE", "native")]
    assert [(line["column"], line["n"], line["failed"], line["mean"]) for line in lost] == [
        ("rel", "0", "1", ""),
        ("m_loc", "0", "1", ""),
    ]
    text = tables.to_markdown(config, found, config.columns)
    assert "| 0 (1 failed, 1 skipped) |" in text and "| 1 (1 failed) |" in text


def test_the_share_at_the_stop_is_told() -> None:
    config = study(axes={"x": {"a": {}}}, baseline={})
    rows = {
        "a": [row(n, "vqa", rel=1.0) | {"stop_reason": reason} for n, reason in enumerate(["converged", "max_steps"])]
    }
    (cell,) = tables.cells(config, arms(config), rows)
    assert cell.at_stop == 0.5 and "0.1 (50%)" in tables.to_markdown(config, [cell], ["rel"])


def test_three_axes_have_a_block_for_each_value_of_the_first() -> None:
    config = study(axes={"backbone": {"A": {}, "B": {}}} | TWO_AXES)
    text = tables.to_markdown(config, tables.cells(config, arms(config), rows_of(config, 2)), config.columns)
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert titles == ["**Questions, A**", "**Questions, B**", "**Captions, A**", "**Captions, B**"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.83, ".830"), (-0.05, "-.050"), (1.0, "1.000"), (12.3, "12"), (1.5e7, "1.5e+07"), (0.0, ".000")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert formatting.number(value) == text


def test_correlations_equal_spearmans() -> None:
    config = study(axes={"x": {"base": {}, "arm": {}}}, baseline={"x": "base"}, correlate="rephrase_distance")
    rng = np.random.default_rng(0)
    rows: dict[str, list[Row]] = {"base": [], "arm": []}
    for number in range(12):
        for arm in rows:
            rows[arm].append(row(number, "vqa", rel=rng.normal(), m_loc=1.0, rephrase_distance=number / 12))
    rows["base"][3] = row(3, "vqa", FAILED)
    kept = [number for number in range(12) if number != 3]
    gains = [rows["arm"][number]["rel"] - rows["base"][number]["rel"] for number in kept]
    by_fact: dict[str, list[tuple[float, float]]] = {}
    for number, gain in zip(kept, gains, strict=True):
        by_fact.setdefault(rows["arm"][number]["fact"], []).append((number / 12, gain))
    assert 4 < len(by_fact) < len(kept)
    means = [np.mean(pairs, axis=0) for pairs in by_fact.values()]
    rho, p = stats.spearmanr([mean[0] for mean in means], [mean[1] for mean in means])
    (line,) = tables.correlations(config, arms(config), rows).splitlines()[2:]
    assert line == f"| arm | 11 | {rho:+.2f} (p {p:.2g}) |  |", "without spread there is nothing to rank"


def drawn(config: StudyConfig, monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[Row]] | None = None) -> Figure:
    pictures: list[Figure] = []
    original = plots.to_png

    def keep(picture: Figure) -> bytes:
        pictures.append(picture)
        return original(picture)

    monkeypatch.setattr(plots, "to_png", keep)
    found = tables.cells(config, arms(config), rows or rows_of(config, 4))
    image = plots.draw(config, found)
    assert image.startswith(b"\x89PNG") and len(image) > 5000
    return pictures[0]


COLUMNS = ["rel", "m_loc"]


def test_a_label_is_compared_with_every_other_of_its_axis_over_both_tasks() -> None:
    config = study(compared={"objective": "ODEdit"})
    rows = rows_of(config)
    rows["FT-L_other"][0]["status"] = FAILED
    found = comparisons.comparisons(config, arms(config), rows)
    pairs = [(one.arm.name, one.other.name, one.n) for one in found]
    assert pairs == [
        ("WISE, ODEdit", "WISE, native", 32),
        ("WISE, ODEdit", "WISE, other", 32),
        ("FT-L, ODEdit", "FT-L, native", 32),
        ("FT-L, ODEdit", "FT-L, other", 31),
    ]
    for name in ("rel", "m_loc"):
        p_values = []
        for one in found[:3]:
            values = [np.array([r[name] for r in rows[arm.folder]]) for arm in (one.arm, one.other)]
            assert one.differences[name].mean == pytest.approx((values[0] - values[1]).mean())
        for one in found:
            p_values.append(one.differences[name].p)
        assert [one.differences[name].p_holm for one in found] == pytest.approx(holm(p_values))
    text = comparisons.to_markdown(config, found)
    assert text.splitlines()[2] == "| editor | against | n | rel | m_loc |"
    assert text.count("▲") - text.split("\n\n")[0].count("▲") == 4, "rel against each, and nothing else"
    lines = list(csv.DictReader(io.StringIO(comparisons.to_csv(config, found))))
    assert len(lines) == 4 * 2
    first = lines[0]
    assert (first["editor"], first["objective"], first["against"], first["column"]) == (
        "WISE",
        "ODEdit",
        "native",
        "rel",
    )
    assert float(first["difference"]) == pytest.approx(found[0].differences["rel"].mean, rel=1e-4)


def test_dots_have_a_panel_per_task_and_column_and_a_point_per_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    plot = {"kind": "dots", "y": "editor", "colour": "objective", "columns": [*COLUMNS, "never seen"]}
    picture = drawn(study(plot=plot), monkeypatch)
    assert len(picture.axes) == 2 * len(COLUMNS)
    assert all(len(axes.containers) == 6 for axes in picture.axes)
    assert [axes.get_title() for axes in picture.axes[:2]] == ["reliability", "image locality"]
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == list(TWO_AXES["objective"])


def test_a_column_that_is_only_drawn_has_its_mean_in_the_picture_and_for_machines() -> None:
    config = study(columns=["rel"], plot={"kind": "dots", "y": "editor", "colour": "objective", "columns": ["m_loc"]})
    found = tables.cells(config, arms(config), rows_of(config, 4))
    assert all("m_loc" in cell.means for cell in found)
    assert ",m_loc," in tables.to_csv(config, found) and "m_loc" not in tables.to_markdown(config, found, ["rel"])


def test_dots_of_arms_without_colour_stand_at_their_label(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = drawn(study(plot={"kind": "dots", "y": "objective", "columns": COLUMNS}), monkeypatch)
    # An axis that is not drawn has a row of panels for each label.
    assert len(picture.axes) == 2 * 2 * len(COLUMNS)
    axes = picture.axes[0]
    heights = sorted(float(container[0].get_ydata()[0]) for container in axes.containers)
    assert heights == [0.0, 1.0, 2.0]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(TWO_AXES["objective"])


def test_lines_leave_out_the_reference_and_draw_it_as_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    axes_of = {"lambda": {"adaptive": {}, "0": {}, "0.1": {}, "1": {}}}
    plot = {"kind": "lines", "x": "lambda", "reference": "adaptive", "columns": COLUMNS}
    config = study(axes=axes_of, baseline={"lambda": "adaptive"}, plot=plot)
    picture = drawn(config, monkeypatch)
    assert len(picture.axes) == 2 * len(COLUMNS)
    axes = picture.axes[0]
    found = {
        cell.arm.name: cell for cell in tables.cells(config, arms(config), rows_of(config, 4)) if cell.task == "vqa"
    }
    line, level = axes.containers[0][0], axes.lines[-1]
    assert list(line.get_xdata()) == [0, 1, 2]
    assert list(line.get_ydata()) == [found[name].means["rel"].mean for name in ("0", "0.1", "1")]
    assert set(level.get_ydata()) == {found["adaptive"].means["rel"].mean}


SCALE = {
    "axes": {},
    "models": {"sizes": [2, 16], "ways": ["sum", "joint"]},
    "baseline": {},
    "columns": ["rel", "kept"],
    "plot": {"kind": "bands", "x": "facts", "colour": "way", "columns": ["rel", "kept"], "front": ["m_loc", "rel"]},
}


def test_figures_of_models_are_means_over_both_tasks_and_the_pool_clustered_by_fact() -> None:
    config = study(**SCALE)
    rows = rows_of(config)
    asked = [{"fact": f"fact {number // 3}", "kept": float(number % 4 > 0), "kept_text": None} for number in range(12)]
    found = tables.cells(config, arms(config), rows, {"sum_2": asked})
    assert [(cell.arm.name, cell.task, cell.n) for cell in found] == [
        (name, "all", 32) for name in ("sum, 2", "sum, 16", "joint, 2", "joint, 16")
    ]
    # A fact has two edits of either task.
    values = np.array([row["rel"] for row in rows["sum_2"]]).reshape(2, -1, 2).mean(axis=(0, 2))
    interval = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    mean = found[0].means["rel"]
    assert (mean.mean, mean.low, mean.high) == pytest.approx((values.mean(), *interval))
    assert found[0].means["kept"].mean == 9 / 12 and found[0].means["kept"].n == 12
    assert found[0].means["kept"].low < 9 / 12 and "kept_text" not in found[0].means
    assert "kept" not in found[1].means
    heads = tables.to_markdown(config, found, config.columns).splitlines()[2]
    assert heads == "| way | facts | n | rel | kept |" and "`stop`" not in tables.legend(config)


def test_bands_are_intervals_over_the_numbers_of_facts_and_the_front_is_of_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = study(**SCALE)
    rows = {
        name: [each | {"m_loc": 0.9, "rel": 0.5 + 0.5 * each["rel"]} for each in of_arm]
        for name, of_arm in rows_of(config, 4).items()
    }
    picture = drawn(config, monkeypatch, rows)
    found = tables.cells(config, arms(config), rows)
    rel, front = picture.axes  # no model was asked about the pool
    for cells, axes_line, band in zip((found[:2], found[2:]), rel.lines, rel.collections, strict=True):
        assert list(axes_line.get_xdata()) == [2.0, 16.0]
        assert list(axes_line.get_ydata()) == [cell.means["rel"].mean for cell in cells]
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == min(cell.means["rel"].low for cell in cells)
        assert heights.max() == max(cell.means["rel"].high for cell in cells)
    assert [text.get_text() for text in rel.get_xticklabels()] == ["2", "16"]
    largest = [(cell.means["m_loc"].mean, cell.means["rel"].mean) for cell in (found[1], found[3])]
    shown = [container.lines[0].get_xydata()[0] for container in front.containers]
    assert np.array(shown) == pytest.approx(np.array(largest))
    assert list(map(tuple, front.lines[-1].get_xydata())) == fronts.front(largest)
    assert front.get_title() == "front at 16 facts" and not front.texts
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["sum", "joint"]


def test_a_point_far_below_the_front_is_named_and_does_not_stretch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(**SCALE)
    rows = {name: [each | {"rel": 0.8, "m_loc": 0.9} for each in of_arm] for name, of_arm in rows_of(config, 4).items()}
    rows["sum_16"] = [each | {"rel": 0.0} for each in rows["sum_16"]]
    _, front = drawn(config, monkeypatch, rows).axes
    assert len(front.containers) == 1 and front.get_ylim()[0] > 0
    (text,) = front.texts
    assert text.get_text() == "outside:\nsum (0.90, 0.00)"


def test_heat_maps_show_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(plot={"kind": "heatmap", "x": "objective", "y": "editor", "columns": COLUMNS})
    picture = drawn(config, monkeypatch)
    assert len(picture.axes) == 2 * len(COLUMNS)
    found = [cell for cell in tables.cells(config, arms(config), rows_of(config, 4)) if cell.task == "vqa"]
    shown = np.asarray(picture.axes[0].images[0].get_array())
    assert shown == pytest.approx(np.array([cell.means["rel"].mean for cell in found]).reshape(2, 3))
    assert [text.get_text() for text in picture.axes[0].texts] == [
        formatting.number(cell.means["rel"].mean) for cell in found
    ]


def test_arms_that_all_failed_leave_a_gap_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in (
        {"kind": "dots", "y": "editor", "colour": "objective", "columns": COLUMNS},
        {"kind": "lines", "x": "objective", "reference": "native", "columns": COLUMNS},
        {"kind": "heatmap", "x": "objective", "y": "editor", "columns": COLUMNS},
    ):
        config = study(plot=plot)
        rows = rows_of(config, 2)
        for lost in ("WISE_ODEdit", "FT-L_native", "FT-L_ODEdit"):
            rows[lost] = [row(0, "vqa", FAILED)]
        assert plots.draw(config, tables.cells(config, arms(config), rows)).startswith(b"\x89PNG")


def test_models_without_an_edit_leave_a_gap_in_the_bands() -> None:
    config = study(**SCALE)
    rows = rows_of(config, 2) | {"sum_2": [row(0, "vqa", SKIPPED)]}
    assert plots.draw(config, tables.cells(config, arms(config), rows)).startswith(b"\x89PNG")


def test_an_arm_compares_with_the_arm_that_differs_in_the_baselines_axis_alone() -> None:
    config = study()
    every = arms(config)
    bases = {arm.name: tables.baseline_of(config, arm, every) for arm in every}
    assert {name: base.name for name, base in bases.items() if base} == {
        f"{editor}, {objective}": f"{editor}, native"
        for editor in ("WISE", "FT-L")
        for objective in ("ODEdit", "other")
    }
    alone = [Arm({"editor": "WISE", "objective": "ODEdit"}, {})]
    assert tables.baseline_of(config, alone[0], alone) is None
