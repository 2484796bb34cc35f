"""Settings of a search, read from one YAML file and checked strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from odedit.errors import InputError, unknown_name
from odedit.evaluation import columns
from odedit.evaluation.score import SCORE
from odedit.evaluation.statistics import MAIN
from odedit.settings import Settings
from pipeline.config import strict
from pipeline.config.run import AUTO, RunConfig, apply_override, from_dict, read_yaml
from pipeline.study.spec import merged
from tune.space import Space

DEMO = Path(__file__).parent / "demo.yaml"
COMBINED = columns.groups()
OBJECTIVES = (SCORE, *COMBINED, *MAIN)
"""Shares between 0 and 1; more is better."""

_NOT_COMPARED = ("trials", "concurrent", "retries", "storage")
_SETTINGS_NOT_COMPARED = ("tracking", "pipeline", "training", "out", "keep_edits")


def _default_space() -> dict[str, Any]:
    """The paper's three knobs, and lambda_0 in a range where lambda changes edits; below it nothing else can matter."""
    return {
        "objective.dual_rate": {"low": 1e-3, "high": 0.3, "log": True},
        "objective.multiplier.depth": {"low": 1, "high": 4},
        "objective.multiplier.initial": {"low": 0.01, "high": 1.0, "log": True},
        "objective.multiplier.output_scale": {"choices": [1.0]},
        "objective.multiplier.cap": {"choices": [None]},
        "objective.bandwidths": {
            "scale": {"low": 0.01, "high": 10.0, "log": True},
            "number": {"low": 1, "high": 7},
        },
    }


@dataclass(frozen=True)
class Rungs(Settings):
    """Numbers of edits that a trial is scored on: few at first, more for the better trials.

    A trial goes on from a rung if it is among the best `1 / factor` of the trials that have reached the rung so far
    (asynchronous successive halving, arXiv 1810.05934).

    Attributes:
        edits: Number of edits at the first rung.
        factor: Ratio of the edits of two consecutive rungs.
        number: Number of rungs; 1: no trial is stopped early.
    """

    edits: Annotated[int, Ge(1)] = 12
    factor: Annotated[int, Ge(2)] = 2
    number: Annotated[int, Ge(1)] = 3

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of edits at each rung, including those of the rungs before."""
        return tuple(self.edits * self.factor**rung for rung in range(self.number))


@dataclass(frozen=True)
class SearchConfig(Settings):
    """A search.

    Attributes:
        title: Title of the summary, in a line.
        settings: Settings of all trials, as in a run's YAML, and the defaults that the best trial is compared with.
            `settings.pipeline` sets the resources of a trial (`gpus_per_actor`, a share of a GPU, and
            `threads_per_actor`); `ray_address`, `device`, `batch_size` and `feature_store` are as for a run.
        validation: Changes to `settings.data`: the records that trials are scored on.
        evaluation: Changes to `settings.data`: the records of the final comparison, which no trial edits.
        space: Path of a setting -> its values; see `tune.space`.
        objectives: Figures to maximise: `score` (the harmonic mean of the five metrics), `reliability`, `generality`,
            `locality`, or a metric. Several of them give a Pareto front.
        trials: Number of different points, including those stopped early or failed.
        concurrent: Number of trials at a time.
        rungs: Numbers of edits that a trial is scored on.
        sampler: `tpe`, `random`, `cmaes` (one objective), `nsga2` (several).
        storage: Optuna's storage: the address of a database, or a journal file; null: OUT/optuna.journal, if OUT is
            a folder.
        retries: Number of times that a trial whose worker died is resumed before it counts as failed.
        defaults_first: Try the defaults first, if the space holds that point.
        seed: Seed of the sampler and of the order of the validation records.
    """

    title: str = "search"
    settings: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=lambda: {"path": "embedded:validation"})
    evaluation: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=_default_space)
    objectives: tuple[str, ...] = (SCORE,)
    trials: Annotated[int, Ge(1)] = 32
    concurrent: Annotated[int, Ge(1)] = 2
    rungs: Rungs = field(default_factory=Rungs)
    sampler: Literal["tpe", "random", "cmaes", "nsga2"] = "tpe"
    storage: str | None = None
    retries: Annotated[int, Ge(0)] = 2
    defaults_first: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))
        super().__post_init__()
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise ValueError(f"objectives: {unknown_name('objective', name, OBJECTIVES)}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives: got {list(self.objectives)}, expected at least one, none of them twice.")
        several = len(self.objectives) > 1
        if several and self.sampler == "cmaes":
            raise ValueError("sampler: 'cmaes' takes a single objective; use 'tpe', 'nsga2' or 'random' for several.")
        if not several and self.sampler == "nsga2":
            raise ValueError("sampler: 'nsga2' is for several objectives; use 'tpe', 'cmaes' or 'random' for one.")

    @property
    def judged_by(self) -> str:
        """The figure that ranks trials: the objective, or the score if there are several."""
        return self.objectives[0] if len(self.objectives) == 1 else SCORE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML."""
        return asdict(self) | {"objectives": list(self.objectives)}

    def identity(self) -> dict[str, Any]:
        """Values that identify a search: all but the number of trials, their resources and their storage."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NOT_COMPARED}
        settings = {name: value for name, value in self.settings.items() if name not in _SETTINGS_NOT_COMPARED}
        return values | {"settings": settings}


@dataclass(frozen=True)
class Search:
    """A search that has been checked.

    Attributes:
        config: Settings of the search.
        space: Parameters.
        defaults: Run of the default settings on the evaluation records.
        trial: Run of the default settings on the validation records, which every trial varies.
        notes: Notes for the user: parameters that cannot matter anywhere in the space.
    """

    config: SearchConfig
    space: Space
    defaults: RunConfig
    trial: RunConfig
    notes: tuple[str, ...] = ()


def load(path: Path | None, overrides: Sequence[str] = ()) -> SearchConfig:
    """Reads a search's YAML, or the demo's, and applies `key.sub=value` overrides.

    Raises:
        InputError: The file is missing or not YAML, or settings are wrong: one line for each.
    """
    values = read_yaml(path if path is not None else DEMO)
    for text in overrides:
        override(values, text)
    return from_values(values)


def override(values: dict[str, Any], text: str) -> None:
    """Applies `key.sub=value` in place. In `space`, a parameter's whole path is one key.

    `space.seed=null` removes a parameter.

    >>> values = {"space": {"objective.dual_rate": {"low": 1, "high": 2}}}
    >>> override(values, "space.objective.dual_rate.high=3"); values
    {'space': {'objective.dual_rate': {'low': 1, 'high': 3}}}
    """
    key, equals, value = text.partition("=")
    if not key.startswith("space.") or not equals:
        apply_override(values, text)
        return
    name = key.removeprefix("space.")
    space = values.get("space")
    space = dict(space) if isinstance(space, Mapping) else {}
    parents = [known for known in space if name.startswith(f"{known}.") and isinstance(space[known], Mapping)]
    if parents:
        known = max(parents, key=len)
        section = dict(space[known])
        apply_override(section, f"{name.removeprefix(known + '.')}={value}")
        space[known] = section
    else:
        parsed: dict[str, Any] = {}
        apply_override(parsed, f"value={value}")
        space[name] = parsed["value"]
    values["space"] = {known: section for known, section in space.items() if section is not None}


def from_values(values: Mapping[str, Any]) -> SearchConfig:
    """The search of a mapping as read from YAML.

    Raises:
        InputError: Settings are wrong: one line for each.
    """
    return strict.build(SearchConfig, values)


def check(config: SearchConfig) -> Search:
    """Checks all settings, and those of runs at the ends of the space, before any trial runs.

    Raises:
        InputError: A line for each setting that is wrong.
    """
    # `merged` keeps an editor's settings only under the same name, so the default editor is named too.
    editor = config.settings.get("editor") or {}
    base = {**config.settings, "editor": {"name": "wise", **editor} if isinstance(editor, Mapping) else editor}
    defaults = _run(merged(base, {"data": config.evaluation}))
    trial = _run(merged(base, {"data": config.validation, "keep_edits": False}))
    if _same_records(defaults, trial):
        raise InputError(
            f"validation.path: got {trial.data.path!r}, which the final comparison uses as well. Score trials on other "
            "records: a search adapts to the records that it is scored on."
        )
    if trial.pipeline.actors != AUTO:
        raise InputError("settings.pipeline.actors: a trial is one worker; 'concurrent' says how many run at a time.")
    if trial.pipeline.measure_memory:
        raise InputError("settings.pipeline.measure_memory: trials are not measured; leave it out.")
    space = Space(config.space, merged(base, {"data": config.evaluation}))
    return Search(config, space, defaults, trial, tuple(_without_effect(space)))


def _without_effect(space: Space) -> Iterator[str]:
    """Notes on searched settings of the objective that change no edit at any corner of the space."""
    searched = [parameter.name for parameter in space.parameters if not parameter.is_fixed]
    section = "objective."
    multiplier = (f"multiplier.{name}" for name in ("initial", "cap", "weight", "width", "normalisation"))
    names = ("name", "penalty", "dual_rate", "dual_schedule", *multiplier)
    deciding = {f"{section}{name}" for name in names}
    reasons = [run.objective.without_effect for run in space.corners(deciding)]
    alike: dict[str, list[str]] = {}
    for name in searched:
        setting = name.removeprefix(section).partition(".")[0]
        if name.startswith(section) and reasons and all(setting in of_one for of_one in reasons):
            alike.setdefault(reasons[-1][setting], []).append(f"space.{name}")
    for reason, paths in alike.items():
        yield f"{', '.join(paths)}: cannot matter: {reason}."


def _same_records(first: RunConfig, second: RunConfig) -> bool:
    return first.data.path == second.data.path


def _run(values: Mapping[str, Any]) -> RunConfig:
    try:
        return from_dict(values)
    except InputError as error:
        raise InputError("\n".join(f"settings.{line}" for line in str(error).splitlines())) from error
