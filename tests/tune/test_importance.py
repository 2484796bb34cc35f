"""Shares of the parameters against variances that are known, and their intervals."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest

from tune.importance import Share, Spread, spreads
from tune.report import _importance_text


def searched(score: Any, trials: int = 60) -> optuna.Study:
    """A random search over a logarithmic range, a linear one, whole numbers and a single choice."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))

    def objective(trial: optuna.Trial) -> float:
        rate, weight = trial.suggest_float("rate", 1e-3, 1.0, log=True), trial.suggest_float("weight", 0.0, 1.0)
        depth = trial.suggest_int("depth", 1, 4)
        trial.suggest_categorical("cap", [None])
        return float(score(rate, weight, depth))

    study.optimize(objective, n_trials=trials)
    return study


def test_shares_are_those_of_the_variances() -> None:
    """log10(rate) is uniform: Var(log10(rate) / 3) = 1 / 12 and Var(weight / 2) = 1 / 48, four to one."""
    study = searched(lambda rate, weight, depth: math.log10(rate) / 3 + 0.5 * weight)
    (spread,) = spreads(study, ["score"], resamples=6).values()
    assert list(spread.shares) == ["rate", "weight", "depth"], "the largest first, and no share for a single value"
    assert spread.shares["rate"].value == pytest.approx(0.8, abs=0.1)
    assert spread.shares["weight"].value == pytest.approx(0.2, abs=0.1)
    assert spread.shares["depth"].value < 0.05
    for share in spread.shares.values():
        assert 0 <= share.low <= share.value <= share.high <= 1
    assert spread.shares["rate"].low > spread.shares["weight"].high
    values = [trial.value for trial in study.trials]
    assert (spread.trials, spread.low, spread.high) == (60, min(values), max(values))
    assert spread.deviation == pytest.approx(math.sqrt(5 / 48), rel=0.15)


def test_what_matters_at_small_values_of_a_logarithmic_range_counts() -> None:
    """A step at .01, a third of the range on its own scale; on a linear scale it is one percent of it."""
    study = searched(lambda rate, weight, depth: rate < 0.01)
    (spread,) = spreads(study, ["score"], resamples=2).values()
    assert spread.shares["rate"].value > 0.9


def test_an_interval_is_wide_with_few_trials_and_the_same_every_time() -> None:
    study = searched(lambda rate, weight, depth: weight + 0.3 * depth, trials=8)
    first, second = (spreads(study, ["score"], resamples=6)["score"] for _ in range(2))
    assert first == second
    assert max(share.high - share.low for share in first.shares.values()) > 0.3


def test_a_search_in_which_nothing_matters_says_so() -> None:
    study = searched(lambda rate, weight, depth: 0.94314, trials=14)
    found = spreads(study, ["score"])
    assert found == {"score": Spread(14, 0.94314, 0.94314, 0.0, {})}
    assert _importance_text(found).startswith("score is .943 in each of the 14 complete trials: nothing that was")
    assert spreads(searched(lambda *_: 1.0, trials=0), ["score"]) == {}
    few = spreads(searched(lambda rate, *_: rate, trials=3), ["score"])
    assert few["score"].shares == {} and "Too few trials" in _importance_text(few)


def test_the_report_shows_the_interval_and_what_is_in_no_share() -> None:
    text = _importance_text({"score": Spread(20, 0.9, 0.96, 0.012, {"depth": Share(0.7, 0.4, 0.85)})})
    assert "score varied with: .900 to .960 over 20 complete trials, standard deviation 0.0120" in text
    assert "| `depth` | .700 [.400, .850] |" in text and "| several together | .300 |" in text
