"""What the parameters of a search explain: their shares of the objective's variance, with intervals.

References:
    Hutter, Hoos, Leyton-Brown (2014), An Efficient Approach for Assessing Hyperparameter Importance (fANOVA).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

_SEED = 0
_LEAST = 4
"""Smallest number of complete trials for which shares are computed."""
_RESAMPLES, _TREES = 60, 8
"""Bootstrap samples of an interval, and trees of the forest that fANOVA fits to each of them."""


@dataclass(frozen=True)
class Share:
    """Explained share of the variance, between 0 and 1.

    Attributes:
        value: Share over the complete trials.
        low, high: Ends of its 95% interval: percentiles over bootstrap samples of the trials.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """What an objective's variance over the complete trials consists of.

    Attributes:
        trials: Number of complete trials.
        low, high: Smallest and largest value of the objective.
        deviation: Standard deviation of the values.
        shares: Parameter -> explained share, largest first; empty without variance or with too few trials. Covers
            parameters that vary and are active in every complete trial. What they explain together is in no share.
    """

    trials: int
    low: float
    high: float
    deviation: float
    shares: Mapping[str, Share]


def spreads(study: Any, objectives: Sequence[str], resamples: int = _RESAMPLES) -> dict[str, Spread]:
    """Objective -> its spread over the complete trials of an Optuna study; empty without a complete trial."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {name: _spread(done, index, resamples) for index, name in enumerate(objectives) if done}


def _spread(done: Sequence[FrozenTrial], index: int, resamples: int) -> Spread:
    values = [float(trial.values[index]) for trial in done]
    shares = {}
    if len(done) >= _LEAST and len(set(values)) > 1:
        whole = _fanova(done, values)
        generator = np.random.default_rng(_SEED)
        drawn = [_resampled(done, values, generator) for _ in range(resamples)]
        for name, value in sorted(whole.items(), key=lambda item: -item[1]):
            low, high = np.quantile([sample.get(name, 0.0) for sample in drawn], (0.025, 0.975))
            shares[name] = Share(value, min(float(low), value), max(float(high), value))
    return Spread(len(done), min(values), max(values), pstdev(values), shares)


def _resampled(
    done: Sequence[FrozenTrial], values: Sequence[float], generator: np.random.Generator
) -> dict[str, float]:
    """Shares over a bootstrap sample of the trials; empty if it holds a single value."""
    chosen = generator.integers(len(done), size=len(done))
    sample = [values[number] for number in chosen]
    if len(set(sample)) < 2:
        return {}
    return _fanova([done[number] for number in chosen], sample, _TREES)


def _fanova(trials: Sequence[FrozenTrial], values: Sequence[float], trees: int = 64) -> dict[str, float]:
    """Shares of the parameters that vary."""
    study = optuna.create_study(direction="maximize")
    study.add_trials([_plain(trial, value) for trial, value in zip(trials, values, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=_SEED)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    fixed = {name for trial in trials for name, values_of in trial.distributions.items() if values_of.single()}
    return {name: float(share) for name, share in shares.items() if name not in fixed}


def _plain(trial: FrozenTrial, value: float) -> FrozenTrial:
    """The trial with the logarithms of its logarithmic parameters.

    Optuna's fANOVA weighs all of a range alike: as it stands, the lower decades of a logarithmic range would count for
    next to nothing.
    """
    params, distributions = dict(trial.params), dict(trial.distributions)
    for name, range_of in trial.distributions.items():
        if isinstance(range_of, FloatDistribution | IntDistribution) and range_of.log and not range_of.single():
            params[name] = math.log(params[name])
            distributions[name] = FloatDistribution(math.log(range_of.low), math.log(range_of.high))
    return optuna.trial.create_trial(params=params, distributions=distributions, value=value)
