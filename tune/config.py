"""What a search is: one YAML, checked strictly, as one frozen `SearchConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from odedit.errors import InputError, unknown_name
from odedit.evaluation import columns
from odedit.evaluation.statistics import MAIN
from odedit.settings import Settings
from pipeline.config import strict
from pipeline.config.run import AUTO, RunConfig, apply_override, from_dict, read_yaml
from pipeline.study.spec import merged
from tune.space import Space

DEMO = Path(__file__).parent / "demo.yaml"
SCORE = "score"
COMBINED = columns.groups()
OBJECTIVES = (SCORE, *COMBINED, *MAIN)
"""Each is a share between 0 and 1, and more is better."""

_NOT_COMPARED = ("trials", "concurrent", "retries", "storage")
_SETTINGS_NOT_COMPARED = ("tracking", "pipeline", "training", "out", "keep_edits")


def _default_space() -> dict[str, Any]:
    return {
        "objective.dual_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "objective.multiplier.depth": {"low": 1, "high": 4},
        "objective.bandwidths": {
            "scale": {"low": 0.01, "high": 10.0, "log": True},
            "number": {"low": 1, "high": 7},
        },
    }


@dataclass(frozen=True)
class Rungs(Settings):
    """How many edits a trial is scored on: few at first, and more for those that are not stopped.

    A trial goes on from a rung if it is among the best `1 / factor` of those that have come so far
    (arXiv 1810.05934, asynchronous successive halving).

    Attributes:
        edits: At the first rung.
        factor: Of the edits of each rung to those of the one before.
        number: How many rungs; 1: every trial gets all its edits.
    """

    edits: Annotated[int, Ge(1)] = 12
    factor: Annotated[int, Ge(2)] = 2
    number: Annotated[int, Ge(1)] = 3

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edits of each rung, those of the ones before included."""
        return tuple(self.edits * self.factor**place for place in range(self.number))


@dataclass(frozen=True)
class SearchConfig(Settings):
    """A search.

    Attributes:
        title: What is searched for, in a line.
        settings: What all trials share, as in a run's YAML; also the defaults that the best trial is compared with.
            `settings.pipeline` says what a trial takes: `gpus_per_actor` (a share of a GPU), `threads_per_actor`;
            and `ray_address`, `device`, `batch_size`, `feature_store` as for a run.
        validation: Its changes to `settings.data`: the records that trials are scored on.
        evaluation: Its changes to `settings.data`: the records of the final comparison, which no trial has seen.
        space: Path of a setting -> its values; see `tune.space`.
        objectives: What is raised: `score` (the harmonic mean of the five metrics), `reliability`, `generality`,
            `locality`, or a metric. Several: the Pareto front is searched for.
        trials: Different points to try, those that were stopped early or failed included.
        concurrent: Trials at a time.
        rungs: Edits of a trial.
        sampler: `tpe`, `random`, `cmaes` (one objective), `nsga2` (several).
        storage: Where Optuna keeps the search: a database's address, or a journal file; null: OUT/optuna.journal,
            where OUT is a folder.
        retries: How often a trial whose worker died is taken up again before it counts as failed.
        defaults_first: The first trial changes nothing, if the space holds that point.
        seed: Of the sampler, and of the order of the validation records.
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
        """What decides which trials go on and which is the best: the objective, or of several the score."""
        return self.objectives[0] if len(self.objectives) == 1 else SCORE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML has them."""
        return asdict(self) | {"objectives": list(self.objectives)}

    def identity(self) -> dict[str, Any]:
        """What makes two searches the same: all but the number of trials, where they run and where they are kept."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NOT_COMPARED}
        settings = {name: value for name, value in self.settings.items() if name not in _SETTINGS_NOT_COMPARED}
        return values | {"settings": settings}


@dataclass(frozen=True)
class Search:
    """A search that has been checked.

    Attributes:
        config: As it was given.
        space: The parameters.
        defaults: The run on the evaluation records without any change.
        trial: The run that every trial is a variant of, on the validation records.
    """

    config: SearchConfig
    space: Space
    defaults: RunConfig
    trial: RunConfig


def load(path: Path | None, overrides: Sequence[str] = ()) -> SearchConfig:
    """Reads a search's YAML, or the demo's, and lays `key.sub=value` overrides over it.

    Raises:
        InputError: The file is missing or no YAML, or a setting is wrong: one line for each.
    """
    values = read_yaml(path if path is not None else DEMO)
    for text in overrides:
        override(values, text)
    return from_values(values)


def override(values: dict[str, Any], text: str) -> None:
    """As `pipeline.config.apply_override`, but a parameter's name is one key of `space`, with all its dots.

    `space.seed=null` takes a parameter out.

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
    """The search that a mapping as read from YAML describes. Raises InputError as `load` does."""
    return strict.build(SearchConfig, values)


def check(config: SearchConfig) -> Search:
    """Builds the runs at the ends of the space, so that nothing is refused once trials run.

    Raises:
        InputError: A line for each setting that is wrong.
    """
    # Named, so that a point that names an editor is seen to keep or to change it.
    editor = config.settings.get("editor") or {}
    base = {**config.settings, "editor": {"name": "wise", **editor} if isinstance(editor, Mapping) else editor}
    defaults = _run(merged(base, {"data": config.evaluation}))
    trial = _run(merged(base, {"data": config.validation, "keep_edits": False}))
    if _same_records(defaults, trial):
        raise InputError(
            f"validation.path: got {trial.data.path!r}, which the final comparison uses as well. Score trials on other "
            "records: a search finds what suits the records that it is scored on."
        )
    if trial.pipeline.actors != AUTO:
        raise InputError("settings.pipeline.actors: a trial is one worker; 'concurrent' says how many run at a time.")
    if trial.pipeline.measure_memory:
        raise InputError("settings.pipeline.measure_memory: trials are not measured; leave it out.")
    return Search(config, Space(config.space, merged(base, {"data": config.evaluation})), defaults, trial)


def _same_records(first: RunConfig, second: RunConfig) -> bool:
    return first.data.path == second.data.path


def _run(values: Mapping[str, Any]) -> RunConfig:
    try:
        return from_dict(values)
    except InputError as error:
        raise InputError("\n".join(f"settings.{line}" for line in str(error).splitlines())) from error
