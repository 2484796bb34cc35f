"""The points of a search and their results, kept in Optuna's storage.

A trial that was running when the search was killed is handed out again under its number. A point that a sampler
proposes a second time is not tried again.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from odedit.errors import InputError, in_words
from odedit.runtime.addresses import masked
from odedit.storage.location import Location
from tune.config import SearchConfig
from tune.dimensions import label
from tune.folder import JOURNAL
from tune.scoring import Report
from tune.space import Point, Space, key_of

KEY, VALUES, ERROR, SEARCH, REPEATED = "key", "settings", "error", "odedit.search", "repeated"
RUNG = "rung:"
COMPLETE, PRUNED, FAILED, RUNNING = "complete", "pruned", "failed", "running"
_PROPOSALS = 20
"""Number of repeated proposals after which an untried point is drawn instead."""
_ENGINES = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}}
"""Connection arguments: seconds that a second writer of a sqlite file, or a client of a server, waits."""


@dataclass(frozen=True)
class Trial:
    """A point and its results.

    Attributes:
        number: Number of Optuna's trial.
        key: Hash of the point.
        point: Parameter -> value.
        state: `complete`, `pruned` (stopped early), `failed` or `running`.
        reports: Number of edits at a rung -> report.
        error: Message of a failed trial.
    """

    number: int
    key: str
    point: Point
    state: str
    reports: dict[int, Report]
    error: str = ""

    @property
    def last(self) -> Report | None:
        """Report of the last rung."""
        return self.reports[max(self.reports)] if self.reports else None


def open_storage(config: SearchConfig, out: Location) -> BaseStorage:
    """Optuna's storage of the search.

    Raises:
        InputError: The storage cannot be written to.
    """
    text = config.storage
    try:
        if text is not None and "://" in text:
            arguments = _ENGINES.get(make_url(text).get_backend_name(), {})
            # The pool reopens connections that the database has closed meanwhile.
            return RDBStorage(text, engine_kwargs={"connect_args": arguments, "pool_pre_ping": True})
        path = journal(config, out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            return JournalStorage(JournalFileBackend(str(path)))
    except Exception as error:
        where = masked(text) if text is not None else str(journal(config, out))
        raise InputError(
            f"storage: {where!r} cannot be written to ({in_words(error)}). Give a file, or the address of a database, "
            "such as sqlite:////data/search.db or postgresql+psycopg://user@host/name."
        ) from error


def check_driver(config: SearchConfig) -> None:
    """Raises InputError if the driver of the search's database is unknown or not installed."""
    if config.storage is None or "://" not in config.storage:
        return
    try:
        make_url(config.storage).get_dialect().import_dbapi()
    except (ArgumentError, ImportError) as error:
        raise InputError(
            f"storage: {masked(config.storage)!r} cannot be used ({in_words(error)}). The address of a PostgreSQL "
            "database begins with postgresql+psycopg://, that of a file on this machine with sqlite:///; for another "
            "database, install the library that is missing."
        ) from error


def journal(config: SearchConfig, out: Location) -> Path:
    """Path of the journal file."""
    return Path(config.storage).expanduser().absolute() if config.storage is not None else Path(out / JOURNAL)


class Points:
    """Source of points, and record of their results.

    Args:
        config: Settings of the search.
        space: Parameters.
        out: Folder of the search.
        search_id: Id of the search, kept in Optuna's study.
        study_name: Name of Optuna's study.

    Raises:
        InputError: The storage cannot be written to, or its study of that name belongs to another search.
    """

    def __init__(self, config: SearchConfig, space: Space, out: Location, search_id: str, study_name: str) -> None:
        self._config, self._space = config, space
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._storage = open_storage(config, out)
            try:
                self.study = optuna.create_study(
                    study_name=study_name,
                    storage=self._storage,
                    directions=["maximize"] * len(config.objectives),
                    load_if_exists=True,
                )
                owner = self.study.user_attrs.get(SEARCH)
                if owner is None:
                    self.study.set_user_attr(SEARCH, search_id)
            except Exception as error:
                raise InputError(f"storage: the study {study_name!r} cannot be opened ({in_words(error)}).") from error
        if owner not in (None, search_id):
            raise InputError(f"storage: its study {study_name!r} belongs to another search. Choose another storage.")
        num_before = len(self.study.get_trials(deepcopy=False))
        # A resumed search gets another seed: with the same one the sampler would repeat its proposals.
        seed = config.seed + num_before
        self.study.sampler = sampler(config, seed)
        self._random = random.Random(seed)
        self._left = self._taken_up()

    def _taken_up(self) -> list[Trial]:
        """Trials that a killed search left running; closes those without a whole point."""
        left = []
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if KEY in frozen.user_attrs:
                left.append(_trial(frozen))
            else:
                self._storage.set_trial_user_attr(frozen._trial_id, REPEATED, "killed before its point was whole")
                self.study.tell(frozen.number, state=TrialState.FAIL)
        return left

    def trials(self) -> list[Trial]:
        """All trials, running ones included, by number."""
        every = self.study.get_trials(deepcopy=False)
        return [_trial(frozen) for frozen in every if KEY in frozen.user_attrs and REPEATED not in frozen.user_attrs]

    def ask(self) -> Trial | None:
        """The next trial; None if there are `trials` of them or no point is left."""
        if self._left:
            return self._left.pop(0)
        known = {trial.key: trial for trial in self.trials()}
        if len(known) >= self._config.trials:
            return None
        if not known and self._config.defaults_first and (first := self._space.defaults()) is not None:
            self.study.enqueue_trial(self._space.stored(first))
        proposals = 0
        while True:
            if proposals >= _PROPOSALS:
                other = self._other(known)
                if other is None:
                    return None
                self.study.enqueue_trial(self._space.stored(other))
            asked = self.study.ask()
            point = self._space.point(asked)
            key = key_of(point)
            if key not in known:
                self._storage.set_trial_user_attr(asked._trial_id, VALUES, label(self._space.settings(point)))
                self._storage.set_trial_user_attr(asked._trial_id, "point", label(point))
                # The key is written last: it marks a whole point.
                self._storage.set_trial_user_attr(asked._trial_id, KEY, key)
                return Trial(asked.number, key, point, RUNNING, {})
            proposals += 1
            self._storage.set_trial_user_attr(asked._trial_id, REPEATED, known[key].number)
            self.study.tell(asked.number, state=TrialState.FAIL)

    def _other(self, known: Mapping[str, Trial]) -> Point | None:
        """A random untried point; None if all were tried. Raises InputError if the space cannot be listed."""
        every = self._space.every_point
        if every is None:
            raise InputError(
                f"space: {_PROPOSALS} proposals in a row had been tried before. Widen the ranges or change the sampler."
            )
        left = [point for point in every if key_of(point) not in known]
        return self._random.choice(left) if left else None

    def report(self, trial: Trial, report: Report) -> None:
        """Stores a trial's report at a rung; a second report of the rung changes nothing."""
        frozen = self._frozen(trial)
        name = f"{RUNG}{report['edits']}"
        if name in frozen.user_attrs:
            return
        if len(self._config.objectives) == 1:  # Optuna has no intermediate values for several objectives
            self._storage.set_trial_intermediate_value(frozen._trial_id, report["edits"], self.values(report)[0])
        self._storage.set_trial_user_attr(frozen._trial_id, name, label(report))

    def values(self, report: Report) -> list[float]:
        """Values of the objectives; 0 for a metric that no record has."""
        return [float(report.get(name, 0.0)) for name in self._config.objectives]

    def finish(self, trial: Trial, state: str, error: str = "") -> None:
        """Closes a trial, unless it is closed already."""
        frozen = self._frozen(trial)
        if frozen.state.is_finished():
            return
        if error:
            self._storage.set_trial_user_attr(frozen._trial_id, ERROR, masked(error))
        last = _trial(frozen).last
        if state == COMPLETE and last is not None:
            self.study.tell(trial.number, self.values(last))
        else:
            self.study.tell(trial.number, state=TrialState.PRUNED if state == PRUNED else TrialState.FAIL)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]


def _trial(frozen: FrozenTrial) -> Trial:
    attributes = frozen.user_attrs
    reports = {
        int(name.removeprefix(RUNG)): json.loads(text) for name, text in attributes.items() if name.startswith(RUNG)
    }
    states = {TrialState.COMPLETE: COMPLETE, TrialState.PRUNED: PRUNED, TrialState.FAIL: FAILED}
    return Trial(
        number=frozen.number,
        key=attributes[KEY],
        point=json.loads(attributes["point"]),
        state=states.get(frozen.state, RUNNING),
        reports=dict(sorted(reports.items())),
        error=attributes.get(ERROR, ""),
    )


def sampler(config: SearchConfig, seed: int) -> BaseSampler:
    """Optuna's sampler of the search."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls some of these options experimental
        if config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if config.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
        if config.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, config.trials // 4)))
        # constant_liar counts running trials as bad ones, so that concurrent trials do not explore the same region.
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=max(4, min(10, config.trials // 3)), constant_liar=config.concurrent > 1
        )


def pareto(trials: list[Trial], objectives: tuple[str, ...]) -> list[Trial]:
    """Complete trials that no other trial dominates."""
    done = [trial for trial in trials if trial.state == COMPLETE and trial.last]

    def values(trial: Trial) -> list[float]:
        assert trial.last is not None
        return [float(trial.last.get(name, 0.0)) for name in objectives]

    def beats(other: Trial, trial: Trial) -> bool:
        pairs = list(zip(values(other), values(trial), strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [trial for trial in done if not any(beats(other, trial) for other in done)]


def best(trials: list[Trial], config: SearchConfig) -> Trial | None:
    """The best complete trial by `judged_by`, on the Pareto front; the first of equal ones, such as the defaults."""
    front = pareto(trials, config.objectives)
    return max(front, key=lambda trial: ((trial.last or {}).get(config.judged_by, 0.0), -trial.number), default=None)
