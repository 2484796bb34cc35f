"""The search space: drawn points, and messages for mistakes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from typer.testing import CliRunner

from odedit.__main__ import app
from odedit.errors import InputError
from tune import config as search_config
from tune.config import check, from_values
from tune.dimensions import Geometric
from tune.space import Space, key_of

WISE = {"editor": {"name": "wise", "site": "layers.2.ffn.in"}}
CONDITIONAL = {
    "editor.margin_in": {"low": 2.0, "high": 8.0, "when": {"editor.name": "wise"}},
    "editor.name": {"choices": ["wise", "ftl"]},
    "objective.kernel": {"choices": ["rbf", "linear"]},
    "objective.bandwidths": {
        "scale": {"low": 0.1, "high": 1.0, "log": True},
        "number": {"low": 1, "high": 3},
        "when": {"objective.kernel": ["rbf"]},
    },
}


def drawn(space: Space, count: int = 30) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.point(study.ask()) for _ in range(count)]


def test_the_demo_searches_the_papers_knobs_where_they_matter() -> None:
    search = check(search_config.load(None))
    assert search.notes == ()
    names = {one.name: one.is_whole for one in search.space.parameters}
    assert not names["objective.dual_rate"] and names["objective.multiplier.depth"]
    assert not names["objective.bandwidths.scale"] and names["objective.bandwidths.number"]
    assert not names["objective.multiplier.initial"]
    assert search.space.defaults() is None, "the default lambda_0 is below the range"
    for point in drawn(search.space, 5):
        settings = search.space.config(point).objective.settings.multiplier
        assert settings.cap is None and settings.output_scale == 1.0 and 0.01 <= settings.initial <= 1.0
    assert search.config.trials >= 16 and search.config.concurrent == 2
    shipped = check(from_values({}))
    assert {one.name for one in shipped.space.parameters} == {name for name in names if "weight" not in name}


def test_bandwidths_are_a_scale_and_a_number() -> None:
    one = Geometric()
    assert one.values(2.0, 3) == [1.0, 2.0, 4.0]
    assert one.parts([4.0, 1.0, 2.0]) == {"scale": 2.0, "number": 3}
    assert one.parts([1.0, 3.0, 4.0]) is None


def test_what_does_not_count_is_left_alone() -> None:
    space = Space(CONDITIONAL, WISE)
    points = drawn(space)
    assert {point["editor.name"] for point in points} == {"wise", "ftl"}
    for point in points:
        assert ("editor.margin_in" in point) == (point["editor.name"] == "wise")
        assert ("objective.bandwidths.scale" in point) == (point["objective.kernel"] == "rbf")
        run = space.config(point)
        assert run.editor.name == point["editor.name"]
        if point["objective.kernel"] == "rbf":
            assert len(run.objective.settings.bandwidths) == point["objective.bandwidths.number"]
        if point["editor.name"] == "wise":
            assert run.editor.settings.margin_in == point["editor.margin_in"]
            assert run.editor.settings.site == "layers.2.ffn.in", "the shared settings of the same editor stay"


def test_equal_points_have_one_name() -> None:
    assert key_of({"a": 1, "b": [2.5]}) == key_of({"b": [2.5], "a": 1}) != key_of({"a": 1, "b": [2.0]})


def test_a_space_that_can_be_listed_is() -> None:
    space = Space(
        {"objective.multiplier.depth": {"low": 1, "high": 3}, "objective.kernel": {"choices": ["rbf", "linear"]}}, WISE
    )
    assert space.every_point is not None and len(space.every_point) == 6
    lists = Space({"objective.bandwidths": {"choices": [[1.0], [0.5, 2.0]]}}, WISE)
    assert {space_point["objective.bandwidths"].__len__() for space_point in drawn(lists)} == {1, 2}
    assert lists.config({"objective.bandwidths": [0.5, 2.0]}).objective.settings.bandwidths == (0.5, 2.0)
    assert Space({"objective.dual_rate": {"low": 1e-4, "high": 1e-1}}, WISE).every_point is None


def test_whole_numbers_for_settings_that_take_nothing_else() -> None:
    space = Space(
        {"editor.max_steps": {"low": 5, "high": 9, "step": 2}, "objective.generality_weight": {"low": 1, "high": 2}},
        WISE,
    )
    points = drawn(space)
    assert {point["editor.max_steps"] for point in points} == {5, 7, 9}
    assert any(point["objective.generality_weight"] % 1 for point in points)


OLD = {
    "objective.dual_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "objective.multiplier.depth": {"low": 1, "high": 4},
    "objective.bandwidths": {"scale": {"low": 0.1, "high": 10}, "number": {"low": 1, "high": 7}},
}


def test_parameters_that_cannot_matter_are_noted() -> None:
    """With the default start, lambda is too small for every learning rate and depth of the space."""
    (note,) = check(from_values({"space": OLD, "settings": {"objective": {"multiplier": {"depth": 2}}}})).notes
    assert note.startswith(
        "space.objective.dual_rate, space.objective.multiplier.depth: cannot matter: lambda starts at"
    )
    assert "bandwidths" not in note and "objective.multiplier.initial" in note
    (note,) = check(from_values({"space": OLD, "settings": {"objective": {"penalty": "fixed:0.1"}}})).notes
    assert "with 'penalty: fixed:0.1' lambda is not learned" in note
    (note,) = check(from_values({"space": OLD, "settings": {"objective": {"name": "native"}}})).notes
    assert "objective.bandwidths.scale" in note and "the objective 'native' does not have this setting" in note
    for alive in (
        {"objective.multiplier.initial": {"low": 1e-3, "high": 0.09}},
        {
            "objective.penalty": {"choices": ["none", "adaptive"]},
            "objective.multiplier.weight": {"low": 1, "high": 200},
        },
        {"objective.dual_schedule": {"choices": ["adaptive", "constant"]}},
    ):
        assert check(from_values({"space": OLD | alive})).notes == ()


WRONG = {
    "space.objective.multiplier.preset={choices: [ours]}": "preset: cannot be searched; search the settings",
    "space.objective.dual_rat={low: 1, high: 2}": "space.objective.dual_rat: unknown key. Did you mean 'dual_rate'?",
    "space.nothing.at.all={low: 1, high: 2}": "space.nothing: unknown key",
    "space.objective.dual_rate={low: 0.1, high: 0.001}": "dual_rate.low: got 0.1, expected less than high",
    "space.objective.dual_rate={low: -1, high: 1}": "space.objective.dual_rate at -1: objective.dual_rate: got -1",
    "space.objective.dual_rate={low: 0, high: 1, log: true}": "expected more than 0 for a logarithmic range",
    "space.objective.dual_rate={low: 0.1}": "space.objective.dual_rate.high: is missing",
    "space.objective.dual_rate={choices: []}": "expected at least one, none of them twice",
    "space.objective.kernel={choices: [rbf, lin]}": "space.objective.kernel at 'lin': objective.kernel: got 'lin'",
    "space.objective.multiplier.depth={low: 0, high: 3}": "space.objective.multiplier.depth at 0",
    "space.objective.bandwidths={scale: {low: 1, high: 2}, number: {low: 0, high: 2}}": "expected whole numbers from 1",
    "space.data.limit={low: 2, high: 3}": "space.data.limit: cannot be searched",
    "space.editor.max_steps={low: 1, high: 5, when: {objective.kernle: rbf}}": "Unknown parameter 'objective.kernle'",
    "space.objective.dual_rate={low: 1, high: 2, lag: true}": "Did you mean 'log'?",
    "sampler=tpee": "sampler: got 'tpee', expected 'tpe' or 'random'",
    "sampler=nsga2": "sampler: 'nsga2' is for several objectives",
    "objectives=[scor]": "Unknown objective 'scor'. Did you mean 'score'?",
    "trials=0": "trials: got 0, expected a whole number >= 1",
    "validation.path=embedded:evaluation": "validation.path: got 'embedded:evaluation', which the final",
    "settings.editor.max_stepps=3": "settings.editor.max_stepps: unknown key. Did you mean 'max_steps'?",
    "rungs.factor=1": "rungs.factor: got 1, expected a whole number >= 2",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_said_in_a_sentence_before_anything_starts(override: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tune", override, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, (done.output, done.exception)
    assert WRONG[override] in done.stderr and "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_conditions_in_a_circle_are_refused() -> None:
    circle = {
        "seed": {"choices": [1, 2], "when": {"objective.kernel": "rbf"}},
        "objective.kernel": {"choices": ["rbf", "linear"], "when": {"seed": 1}},
    }
    with pytest.raises(InputError, match="go round in a circle"):
        Space(circle, WISE)
    with pytest.raises(InputError, match='objective.kernel never is "contrastive"'):
        Space(
            {
                "objective.kernel": {"choices": ["rbf"]},
                "seed": {"choices": [1], "when": {"objective.kernel": "contrastive"}},
            },
            WISE,
        )


def test_a_parameter_is_overridden_and_taken_out_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(
        yaml.safe_dump({"space": {"objective.dual_rate": {"low": 1e-4, "high": 1e-1}, "seed": {"choices": [1]}}})
    )
    found = search_config.load(file, ["space.objective.dual_rate.high=0.5", "space.seed=null"])
    assert found.space == {"objective.dual_rate": {"low": 1e-4, "high": 0.5}}


def test_the_search_shown_in_the_readme_is_a_valid_one() -> None:
    readme = (Path(search_config.__file__).parent / "README.md").read_text(encoding="utf-8")
    start = readme.index("    settings: {editor:")
    search = check(from_values(yaml.safe_load(textwrap.dedent(readme[start : readme.index("\n\n", start)]))))
    assert [one.name for one in search.space.parameters][-1] == "editor.learning_rate"
    assert search.config.rungs.sizes == (24, 48, 96)
