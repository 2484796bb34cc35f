"""The points of a search, kept by Optuna: what was asked, what came of it, and what is left to ask.

Optuna's storage is the truth. A trial that was running when the search was killed is handed out again, under its own
number; a point that a sampler proposes a second time is not tried again.
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
"""Repeated proposals after which one of the points that are left is taken instead."""
_ENGINES = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}}
"""Seconds that a second writer of a sqlite file waits, and that a server has to answer."""


@dataclass(frozen=True)
class Trial:
    """One point and what is known of it.

    Attributes:
        number: Optuna's.
        key: Name of the point.
        point: Parameter -> value.
        state: `complete`, `pruned` (stopped early), `failed` or `running`.
        reports: What it said at each rung, by its edits.
        error: Why it failed.
    """

    number: int
    key: str
    point: Point
    state: str
    reports: dict[int, Report]
    error: str = ""

    @property
    def last(self) -> Report | None:
        """What it said at its last rung."""
        return self.reports[max(self.reports)] if self.reports else None


def open_storage(config: SearchConfig, out: Location) -> BaseStorage:
    """The storage that the search names.

    Raises:
        InputError: It cannot be written to.
    """
    text = config.storage
    try:
        if text is not None and "://" in text:
            arguments = _ENGINES.get(make_url(text).get_backend_name(), {})
            # A connection that a database has closed in the meantime is opened anew.
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
    """Raises InputError if the library that speaks to the search's database is not installed, or there is none."""
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
    """The journal file of a search that is kept in one."""
    return Path(config.storage).expanduser().absolute() if config.storage is not None else Path(out / JOURNAL)


class Points:
    """Asks for points and tells what came of them.

    Args:
        search_id: Of the search; a study of another one is refused.

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
        # Another seed each time: the same would propose what it has proposed before.
        seed = config.seed + num_before
        self.study.sampler = sampler(config, seed)
        self._random = random.Random(seed)
        self._left = self._taken_up()

    def _taken_up(self) -> list[Trial]:
        """Trials that an earlier part of the search left running; those without a whole point are closed."""
        left = []
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if KEY in frozen.user_attrs:
                left.append(_trial(frozen))
            else:
                self._storage.set_trial_user_attr(frozen._trial_id, REPEATED, "killed before its point was whole")
                self.study.tell(frozen.number, state=TrialState.FAIL)
        return left

    def trials(self) -> list[Trial]:
        """Every point that was tried or is being tried, in the order of their numbers."""
        every = self.study.get_trials(deepcopy=False)
        return [_trial(frozen) for frozen in every if KEY in frozen.user_attrs and REPEATED not in frozen.user_attrs]

    def ask(self) -> Trial | None:
        """The next point; None if there are as many as were asked for, or no others."""
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
                # Last: a trial with a key is whole.
                self._storage.set_trial_user_attr(asked._trial_id, KEY, key)
                return Trial(asked.number, key, point, RUNNING, {})
            proposals += 1
            self._storage.set_trial_user_attr(asked._trial_id, REPEATED, known[key].number)
            self.study.tell(asked.number, state=TrialState.FAIL)

    def _other(self, known: Mapping[str, Trial]) -> Point | None:
        """One of the points that nobody has tried, of a space that can be listed."""
        every = self._space.every_point
        if every is None:
            raise InputError(
                f"space: {_PROPOSALS} proposals in a row had been tried before. Widen the ranges or change the sampler."
            )
        left = [point for point in every if key_of(point) not in known]
        return self._random.choice(left) if left else None

    def report(self, trial: Trial, found: Report) -> None:
        """Keeps what a trial says at a rung; a second time changes nothing."""
        frozen = self._frozen(trial)
        name = f"{RUNG}{found['edits']}"
        if name in frozen.user_attrs:
            return
        if len(self._config.objectives) == 1:  # Optuna knows no intermediate values of several objectives
            self._storage.set_trial_intermediate_value(frozen._trial_id, found["edits"], self.values(found)[0])
        self._storage.set_trial_user_attr(frozen._trial_id, name, label(found))

    def values(self, found: Report) -> list[float]:
        """The objectives, in their order; 0 for one that no record has."""
        return [float(found.get(name, 0.0)) for name in self._config.objectives]

    def finish(self, trial: Trial, state: str, error: str = "") -> None:
        """Closes a trial; one that is closed stays as it is."""
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
    """The sampler by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these options are called experimental
        if config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if config.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
        if config.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, config.trials // 4)))
        # Trials that are still running count as bad ones, so that two at a time do not look at the same place.
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=max(4, min(10, config.trials // 3)), constant_liar=config.concurrent > 1
        )


def pareto(trials: list[Trial], objectives: tuple[str, ...]) -> list[Trial]:
    """The complete trials that no other beats in every objective."""
    done = [trial for trial in trials if trial.state == COMPLETE and trial.last]

    def values(trial: Trial) -> list[float]:
        assert trial.last is not None
        return [float(trial.last.get(name, 0.0)) for name in objectives]

    def beats(other: Trial, trial: Trial) -> bool:
        pairs = list(zip(values(other), values(trial), strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [trial for trial in done if not any(beats(other, trial) for other in done)]


def best(trials: list[Trial], config: SearchConfig) -> Trial | None:
    """The complete trial that is judged best, on the Pareto front where there are several objectives.

    Of equal ones the first: the defaults, if they are among them.
    """
    front = pareto(trials, config.objectives)
    return max(front, key=lambda trial: ((trial.last or {}).get(config.judged_by, 0.0), -trial.number), default=None)
