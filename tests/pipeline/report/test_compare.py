"""Comparison of runs: folders of runs, studies and searches, and runs in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from odedit.__main__ import app
from odedit.errors import InputError
from odedit.evaluation.score import harmonic_mean, paired_score, score
from odedit.evaluation.statistics import MAIN
from pipeline.config import strict
from pipeline.config.run import from_dict
from pipeline.driver.run import Outcome
from pipeline.report import compare
from pipeline.study import run as study_runner
from pipeline.study.spec import StudyConfig
from pipeline.tracking import fetch
from tests.support import inline_pipeline

Inline = Callable[..., Outcome]


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def two(settings: dict[str, Any], inline: Inline, tmp_path: Path) -> list[Outcome]:
    """Two runs of the same records; the second stops earlier and has a name that needs escaping."""
    settings |= {"objective": {"sigma2_0": 10.0}, "tracking": {"experiment": "compared"}}
    first = inline(from_dict(settings | {"out": str(tmp_path / "first")}))
    other = settings["editor"] | {"max_steps": 1}
    second = inline(from_dict(settings | {"editor": other, "seed": 1, "out": str(tmp_path / "a|<b>")}))
    return [first, second]


def test_settings_metrics_and_tests_of_two_runs(two: list[Outcome], tmp_path: Path) -> None:
    page = tmp_path / "pages" / "page.html"
    done = odedit("compare", *(outcome.workspace.out for outcome in two), "--html", page)
    assert done.exit_code == 0, (done.output, done.exception)
    text = done.stdout
    assert "# first against a|<b>" in text
    assert "| editor.max_steps | 2 | 1 |" in text and "| seed | 0 | 1 |" in text
    assert "editor.site" not in text and "tracking." not in text, "what is the same is not shown"
    assert "| setting | first | a\\|<b> |" in text
    assert text.count("| 5 |") == 3, "edits of each, and the common ones"
    html = page.read_text()
    assert "a|&lt;b&gt;" in html and "<b>" not in html and "editor.max_steps" in html and "Differences to first" in html


def test_the_same_from_mlflow(two: list[Outcome]) -> None:
    uri = two[0].tracking_uri
    ids = [outcome.run_id for outcome in two]
    with compare.sides([str(name) for name in ids], uri) as kept:
        from_store = compare.compare(kept)
    with compare.sides([str(outcome.workspace.out) for outcome in two], None) as kept:
        from_folders = compare.compare(kept)
    assert from_store.means == from_folders.means and from_store.settings == from_folders.settings
    assert repr(from_store.differences) == repr(from_folders.differences) and from_store.common == [5]
    for arguments, expected in (
        ((ids[0], ids[1]), "--uri: is missing"),
        ((ids[0], "f" * 32, "--uri", uri), f"has no run '{'f' * 32}'"),
        ((ids[0], ids[1], "--uri", "sqlite:///none.db"), "there is no database none.db"),
        ((two[0].workspace.out,), "got 1 run, expected at least two"),
        ((two[0].workspace.out, "nothing"), "there is no folder 'nothing'"),
        ((two[0].workspace.out, two[0].workspace.out.parent), "holds no run, study or search"),
    ):
        wrong = odedit("compare", *arguments)
        assert wrong.exit_code == 2 and expected in wrong.stderr, (arguments, wrong.output)
        assert "Traceback" not in wrong.output


def test_a_study_is_its_arms_and_a_search_its_two_runs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    shared = {name: settings[name] for name in ("supervision", "editor", "pipeline")}
    study = {
        "title": "Small",
        "draw": None,
        "settings": shared | {"data": settings["data"] | {"limit": 2}, "objective": {"sigma2_0": 10.0}},
        "axes": {"objective": {"native": {"objective": {"name": "native"}}, "ODEdit": {}}},
        "baseline": {"objective": "native"},
        "plot": {"kind": "dots", "y": "objective"},
    }
    out = tmp_path / "study"
    found = study_runner.run("fig2", strict.build(StudyConfig, study), out, Console(quiet=True))
    with compare.sides([str(out)], None) as sides:
        assert {side.name for side in sides} == {"native", "ODEdit"}
        names = [side.name for side in sides]
        text = compare.to_markdown(compare.compare(sides))
    assert "| objective.name |" in text and f"Differences to {names[0]}" in text
    parent = json.loads((out / "study.json").read_text())["run_id"]
    assert {name for name, _ in fetch.fetch_results(str(found.tracking_uri), parent, tmp_path / "got")} == set(names)
    search = tmp_path / "search"
    search.mkdir()
    (search / "evaluation").symlink_to(out / "arms")
    (search / "search.json").write_text(json.dumps({"evaluated": ["native", "ODEdit"]}))
    with compare.sides([str(search)], None) as sides:
        assert [side.name for side in sides] == ["search, native", "search, ODEdit"]
    (search / "search.json").write_text("{}")
    with pytest.raises(InputError, match="is not finished"), compare.sides([str(search)], None):
        pass


def side(name: str, values: dict[str, float], prompt: str = "p") -> compare.Side:
    rows = {
        f"{key}\n{prompt}\nt": {"edit_id": key, "fact": key, **dict.fromkeys(MAIN, value)}
        for key, value in values.items()
    }
    return compare.Side(name, {"seed": 0}, rows, {"edited": len(rows), "failed": 1, "skipped": 0})


def test_p_is_corrected_over_the_runs_and_records_of_one_id_have_to_be_the_same() -> None:
    base = {f"e{n}": 0.5 for n in range(12)}
    better = {key: 0.6 + n / 100 for n, key in enumerate(base)}
    found = compare.compare(
        [side("a", base), side("b", better), side("c", base), side("d", better, "another question")]
    )
    assert found.common == [12, 12, 0] and not found.differences[2]
    first = found.differences[0]["rel"]
    assert first.is_clear and first.p_holm == pytest.approx(2 * first.p)
    assert not found.differences[1]["rel"].is_clear
    text = compare.to_markdown(found)
    assert "No record in common with a: d." in text and "▲" in text and "12 (1 failed)" in text
    assert "## Settings that differ\n\nNone." in text


def test_the_score_is_low_as_soon_as_one_metric_is() -> None:
    row = dict.fromkeys(MAIN, 1.0)
    assert score([row]) == 1.0 and score([row | {"rel": 0.0}]) == 0.0
    assert score([row | {"rel": 0.5}]) == pytest.approx(harmonic_mean([0.5, 1, 1, 1, 1])) == pytest.approx(5 / 6)
    assert score([{"rel": 0.25}]) == 0.25, "a metric that no record has does not count"
    assert score([]) != score([])


def test_the_scores_difference_has_an_interval_of_facts() -> None:
    a = {str(n): dict.fromkeys(MAIN, 0.5 + n % 3 / 100) | {"fact": str(n // 2)} for n in range(20)}
    b = {key: row | dict.fromkeys(MAIN, row["rel"] + 0.1 + int(key) % 5 / 100) for key, row in a.items()}
    found = paired_score(a, b)
    # All metrics are equal here, so that the score is their mean and the jackknife is the t-test over facts.
    from odedit.evaluation.statistics import paired

    same = paired(a, b)["rel"]
    assert found is not None and found.n == same.n == 20
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
        (same.mean, same.low, same.high, same.p), rel=1e-3
    )
    equal = paired_score(a, a)
    assert equal is not None and (equal.mean, equal.p) == (0.0, 1.0)
    assert paired_score(a, {"other": b["1"]}) is None
