"""The section `objective`: it holds the settings of all objectives, and takes outside objectives by dotted name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from odedit import objectives
from odedit.errors import InputError
from odedit.objectives.common.multiplier import MultiplierConfig
from pipeline.config.run import from_dict, load
from pipeline.driver.preflight import prepare
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows

Inline = Callable[..., Outcome]
SETTINGS = {
    "name", "reliability_weight", "locality_weight", "generality_weight", "own_weight", "negatives",
    "negatives_at_once", "positives", "locality_direction", "kernel", "rephrases", "bandwidths", "sigma2_0",
    "positions", "environments", "penalty", "warmup", "ramp", "dual_rate", "dual_schedule", "multiplier",
}  # fmt: skip


@pytest.mark.parametrize("name", objectives.names())
def test_a_run_lists_the_settings_of_every_objective(name: str) -> None:
    section = from_dict({"objective": {"name": name}}).to_dict()["objective"]
    assert section.keys() == SETTINGS and section["name"] == name
    default = from_dict({}).to_dict()["objective"]
    assert {key for key, value in section.items() if value != default[key]} <= {"name"}


def test_settings_of_another_objective_are_kept_and_not_read(tmp_path: Path) -> None:
    """A study may set them once for arms with different objectives."""
    run = from_dict({"objective": {"name": "native", "warmup": 0.1, "multiplier": {"depth": 2}}})
    assert run.objective.settings == objectives.ObjectiveConfig("native")
    assert run.objective.own_values() == {"name": "native", "reliability_weight": 1.0, "own_weight": None}
    section = run.to_dict()["objective"]
    assert (section["warmup"], section["multiplier"]["depth"]) == (0.1, 2)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    again = load(tmp_path / "run.yaml", ["objective.name=odedit"])
    assert (again.objective.settings.warmup, again.objective.settings.multiplier.depth) == (0.1, 2)


def test_a_value_that_several_objectives_refuse_is_refused_once() -> None:
    with pytest.raises(InputError) as caught:
        from_dict({"objective": {"name": "native", "locality_weight": -1.0}})
    assert str(caught.value).splitlines() == ["objective.locality_weight: got -1.0, expected a finite number >= 0."]


def test_a_run_is_the_same_whose_file_lists_all_settings(settings: dict[str, Any]) -> None:
    """Older versions of run.json list the settings of all objectives."""
    values = settings | {"objective": {"name": "native", "warmup": 0.1}}
    workspace = prepare(from_dict(values), fresh=False).workspace
    listed = {name for name in json.loads(workspace.run.read_text())["settings"] if name.startswith("objective.")}
    assert {"objective.kernel", "objective.negatives", "objective.multiplier.depth"} <= listed
    prepare(from_dict(values), fresh=False)
    with pytest.raises(InputError, match=r"objective\.warmup: was 0\.1, now 0\.2"):
        prepare(from_dict(values | {"objective": {"name": "native", "warmup": 0.2}}), fresh=False)


def test_a_preset_stands_where_no_setting_is_given(tmp_path: Path) -> None:
    """The run's record lists the values, so that it reads the same when a preset changes."""
    run = from_dict({"objective": {"multiplier": {"preset": "published_code", "weight": 2.0, "depth": 1}}})
    assert run.objective.settings.multiplier == MultiplierConfig.preset("published_code", weight=2.0, depth=1)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    assert load(tmp_path / "run.yaml") == run
    with pytest.raises(InputError, match=r"objective\.multiplier\.preset: got 'ours', but every setting that it names"):
        load(tmp_path / "run.yaml", ["objective.multiplier.preset=ours"])
    for wrong, message in (
        ({"preset": "publishd_code"}, "preset: got 'publishd_code', expected 'ours' or 'published_code'. Did you mean"),
        ({"preset": ["ours"]}, "preset: got ['ours'], expected 'ours' or 'published_code'"),
        ({"presett": "ours"}, "presett: unknown key. Did you mean 'preset'?"),
        ({"preset": "ours", "depth": 0}, "depth: got 0, expected a whole number >= 1"),
        ({"preset": "ours", "initial": 0.2}, "initial: got 0.2, expected less than cap, which is 0.1; raise cap"),
    ):
        with pytest.raises(InputError) as caught:
            from_dict({"objective": {"multiplier": wrong}})
        (line,) = str(caught.value).splitlines()
        assert line.startswith("objective.multiplier.") and message in line


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({}, ()),
        ({"dual_rate": 2e-3}, ("objective.dual_rate has no effect: lambda starts at 0.001 and stays near or below",)),
        (
            {"penalty": "none", "multiplier": {"depth": 1}},
            ("objective.multiplier has no effect: with 'penalty: none'",),
        ),
        ({"dual_rate": 0.1, "multiplier": {"initial": 0.1, "output_scale": 1.0, "cap": None}}, ()),
        ({"name": "native", "dual_rate": 2e-3}, ()),
    ],
)
def test_settings_that_change_nothing_are_noted(
    settings: dict[str, Any], objective: dict[str, Any], expected: tuple[str, ...]
) -> None:
    notes = [note for note in prepare(from_dict(settings | {"objective": objective})).notes if "objective." in note]
    assert len(notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(notes, expected, strict=True))


def test_a_run_from_before_the_multipliers_constants_were_settings_goes_on(settings: dict[str, Any]) -> None:
    run = from_dict(settings)
    workspace = prepare(run).workspace
    state = json.loads(workspace.run.read_text())
    new = {f"objective.multiplier.{name}" for name in ("output_scale", "weight", "normalisation", "counted")}
    assert new < state["settings"].keys()
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in new}
    workspace.run.write_text(json.dumps(state))
    prepare(run)
    with pytest.raises(InputError, match=r"objective\.multiplier\.weight: was 1\.0, now 2\.0"):
        prepare(from_dict(settings | {"objective": {"multiplier": {"weight": 2.0}}}))


def test_an_objective_from_outside_runs_by_its_dotted_name(settings: dict[str, Any], inline: Inline) -> None:
    objective = {"name": "outside.norm", "norm_weight": 0.5, "sigma2_0": 50.0, "warmup": 0.0, "ramp": 0.0}
    outcome = inline(from_dict(settings | {"objective": objective, "keep_edits": False}))
    assert (outcome.summary["n"], outcome.summary["failed"]) == (5, 0)
    assert outcome.summary["objective"] == "outside.norm"
    for row in rows.read_rows(rows.parts(outcome.workspace)):
        losses = row["losses"]
        parts = [losses[name][-1] for name in ("rel", "loc", "gen")] + [0.5 * losses["norm"][-1]]
        penalty = losses["lambda"][-1] * losses["penalty"][-1]
        assert losses["objective"][-1] == pytest.approx(sum(parts) + penalty, rel=1e-4)
    with pytest.raises(InputError, match=r"objective\.norm_wieght: unknown key\. Did you mean 'norm_weight'"):
        from_dict({"objective": {"name": "outside.norm", "norm_wieght": 0.5}})
