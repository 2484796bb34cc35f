"""Configuration of a run: a YAML, strictly validated, as a frozen `RunConfig`.

Settings of the method (editor, objective, supervision, stopping) are dataclasses beside the code that reads them; this
file adds those of records, workers, tracking and training. A YAML holds only what differs from the defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import StringConstraints

from odedit import backbones, editors, objectives, plugins, ways
from odedit.data.names import KNOWN, unknown_column
from odedit.data.supervision import Supervision
from odedit.editing.loop import Stopping
from odedit.errors import InputError, unknown_name
from odedit.evaluation.scores import EvaluationConfig
from odedit.inputs.prompts import find_template
from odedit.runtime.addresses import reason
from odedit.settings import Settings
from odedit.storage.location import LocationLike, at
from pipeline.config import presets, strict

EMBEDDED = "embedded"
SPLITS = ("train", "validation", "evaluation")
AUTO: Literal["auto"] = "auto"
MAX_VALUES = 100_000
"""Most values of a configuration file: YAML aliases can expand a few lines to billions."""
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BackboneConfig:
    """The model that is edited.

    Attributes:
        family: Name of a file in `odedit/backbones`, or a dotted module. Empty: `blip2` or `minigpt4` where the
            checkpoint is one, else `auto`.
        checkpoint: Folder, hub id, or `embedded`.
        dtype: Type of weights and activations; losses are always float32.
        image_size: Width and height to which every picture is resized first (family `auto`). Null: pictures as the
            model's own processor makes them, at the size at which it is served.
        gpus: GPUs of one node that each worker's model is divided over, layer by layer; for models that one GPU cannot
            hold. More than 1 takes precedence over `pipeline.gpus_per_actor`.
    """

    family: str = ""
    checkpoint: str = EMBEDDED
    dtype: Dtype = "float32"
    image_size: Annotated[int, Ge(1)] | None = None
    gpus: Annotated[int, Ge(1), Le(64)] = 1

    def __post_init__(self) -> None:
        if not self.family and self.checkpoint == EMBEDDED:
            object.__setattr__(self, "family", backbones.family_of(EMBEDDED))

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that results depend on: all but the number of GPUs."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "gpus"}

    @property
    def with_family(self) -> BackboneConfig:
        """The same with the family of the checkpoint, where none is named. Raises InputError as `family_of`."""
        return self if self.family else replace(self, family=backbones.family_of(self.checkpoint))

    @property
    def name(self) -> str:
        """Family, checkpoint and fixed image size, for tables."""
        size = "" if self.image_size is None else f"@{self.image_size}"
        return f"{self.family}:{self.checkpoint}{size}"


@dataclass(frozen=True)
class DataConfig(Settings):
    """The records.

    Attributes:
        path: File of records (CSV, JSON, JSON Lines, Parquet), folder of Parquet files, data set saved on disk, packed
            folder, or `embedded:<split>` (train, validation, evaluation) for the embedded benchmark, which is written
            beside the results. `embedded:<split>:<seed>` draws its values, wordings and pictures with another seed.
        columns: Columns of the file by field, such as `{question: prompt, answer: label}`, for names that are not read
            by themselves.
        image_root: Folder of the pictures in `image` and `m_loc`. Null: the folder of the file, or the one above or
            below it that holds them.
        rephrase_root: Folder of the pictures in `image_rephrase`; null: `image_root`.
        pictures: Folder of any pictures, without labels, which supervise where neither a record nor `pool` does. Null:
            the records' own pictures.
        pool: File of other records (the training file), which held-out supervision and the calibration of bandwidths
            draw from, or `embedded:<split>`. Null: the embedded benchmark's training split if the records are of the
            benchmark, else none.
        pool_image_root: Folder of the pool's pictures; null: that of the records.
        pool_rephrase_root: Folder of the pool's pictures in `image_rephrase`; null: `pool_image_root`, or that of the
            records if it is null as well.
        limit: Number of usable records to edit; null: all.
        task: Task of records that name none.
        template: Prompt template, a preset of `odedit.inputs.prompts`.
        max_pixels: Largest allowed picture, in pixels.
        max_bytes: Largest allowed file of a picture, in bytes.
    """

    path: str = f"{EMBEDDED}:evaluation"
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    image_root: str | None = None
    rephrase_root: str | None = None
    pictures: str | None = None
    pool: str | None = None
    pool_image_root: str | None = None
    pool_rephrase_root: str | None = None
    limit: Annotated[int, Ge(1)] | None = None
    task: Literal["auto", "vqa", "caption"] = "auto"
    template: str = "mmedit"
    max_pixels: Annotated[int, Ge(1)] = 50_000_000
    max_bytes: Annotated[int, Ge(1)] = 64 * 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("path", "pool"):
            text = getattr(self, name) or ""
            split, seed = embedded_split(text)
            if split is not None and split not in SPLITS:
                raise ValueError(f"{name}: {unknown_name('embedded split', split, SPLITS)}")
            if split is not None and not seed.isdecimal():
                raise ValueError(f"{name}: got {text!r}, expected {EMBEDDED}:<split>:<seed> with a seed of digits.")
        for key in self.columns:
            if key not in KNOWN:
                raise ValueError(f"columns: {unknown_column(key)}")
        if self.pool is not None and self.pictures is not None:
            raise ValueError("pictures: set beside pool, which has pictures of its own; leave one of the two out.")
        try:
            find_template(self.template)
        except InputError as error:
            raise ValueError(f"template: {error}") from error

    @property
    def split(self) -> str | None:
        """Split of the embedded benchmark in `path`, or None."""
        return embedded_split(self.path)[0]

    @property
    def split_seed(self) -> int:
        """Seed of the embedded benchmark."""
        return int(embedded_split(self.path)[1])


def embedded_split(text: str) -> tuple[str | None, str]:
    """Split and seed of `embedded:<split>[:<seed>]`; None for any other path.

    >>> embedded_split("embedded:train:3"), embedded_split("records.csv")
    (('train', '3'), (None, '0'))
    """
    parts = text.split(":", 2)
    if len(parts) < 2 or parts[0] != EMBEDDED:
        return None, "0"
    return parts[1], parts[2] if len(parts) > 2 else "0"


@dataclass(frozen=True)
class PipelineConfig(Settings):
    """Distribution of the work. Results depend on `batch_size` and `at_once` in their last bits, on the rest not.

    Attributes:
        actors: Workers that hold the model. `auto`: one per GPU, or one per core for a small model; none for a run of
            few groups on this machine, which works in the command's own process, without Ray. A worker that crashes
            is started again. After a crash of the command's own process the same command goes on.
        batch_size: Edits per group: encoded, optimised and written together. A crash costs one group.
        at_once: Largest number of edits of a group that are optimised together (see `odedit.editing.width`).
            `auto`: the number that half of the free memory holds, from the measured use of one edit; small models:
            all. Halved whenever memory runs out.
        device: Device of the edits; `auto`: GPUs if the cluster has any.
        gpus_per_actor: GPUs per actor; 0.5 puts two actors on one GPU.
        threads_per_actor: Threads of an actor without GPU; `auto`: 1 for a small model, else the machine's cores.
        preparers: Workers that read and resize pictures; `auto`: half the cores.
        ray_address: Address of a running cluster, e.g. `auto`. Null: this machine, with a Ray for this run only.
        wait_s: Seconds to wait for missing nodes, at the start or after a node is lost.
        max_attempts: Number of crashes of its worker after which an edit becomes a failed row.
        measure_memory: True adds `peak_bytes` to every row: peak memory of the loop over the group's first edits, as
            many as are optimised together, divided by their number (`odedit.runtime.peak_memory`). Measured over the
            first steps of a second run of the loop, without warm-up.
        feature_store: Folder or address of image features shared by workers and runs, and of the moments that
            `commit.way: bulk` reads; see `odedit.backbones.common.feature_store`. Null: each worker caches its latest
            in memory.
    """

    actors: Literal["auto"] | Annotated[int, Ge(1)] = AUTO
    batch_size: Annotated[int, Ge(1)] = 8
    at_once: Literal["auto"] | Annotated[int, Ge(1)] = AUTO
    device: Literal["auto", "cpu", "cuda"] = AUTO
    gpus_per_actor: Annotated[float, Gt(0), Le(8)] = 1.0
    threads_per_actor: Literal["auto"] | Annotated[int, Ge(1)] = AUTO
    preparers: Literal["auto"] | Annotated[int, Ge(1)] = AUTO
    ray_address: str | None = None
    wait_s: Annotated[float, Ge(0)] = 600.0
    max_attempts: Annotated[int, Ge(2)] = 3
    measure_memory: bool = False
    feature_store: str | None = None


@dataclass(frozen=True)
class TrackingConfig(Settings):
    """Logging to MLflow.

    Attributes:
        enabled: Whether the run is logged.
        uri: Tracking server or database. Null: `mlflow.db` in the parent folder of `out`, which then cannot be an
            address.
        experiment: Name of the experiment, a group of comparable runs.
        run_name: Name of the run; null: the last part of `out`.
        curves: Number of edits, the first, whose losses are averaged into curves; 0: no curves.
        edits_gib: GiB of edits logged as artifacts, in order; `out/edits` has all edits.
        register: Name in the store's model registry that a committed model becomes a new version of. Null: the model is
            logged and not registered.
        alias: Alias of that version: `models:/<register>@<alias>`. MLflow reserves `latest`, `v1`, `v2`, ...
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "odedit"
    run_name: str | None = None
    curves: Annotated[int, Ge(0)] = 1000
    edits_gib: Annotated[float, Ge(0)] = 2.0
    register: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][^/:@]*$")] | None = None
    alias: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")] = "committed"


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Records of `odedit train`. The editor's own settings say how it trains.

    Attributes:
        path: Training records; see `data.path`.
        validation: Validation records, whose loss selects the weights and stops the training.
        image_root: Folder of the pictures of both; null: `data.image_root`.
        rephrase_root: Folder of the rephrase pictures of both; null: `data.rephrase_root`.
        limit: Number of training records; null: all.
        validation_limit: Number of validation records; null: all.
    """

    path: str = f"{EMBEDDED}:train"
    validation: str = f"{EMBEDDED}:validation"
    image_root: str | None = None
    rephrase_root: str | None = None
    limit: Annotated[int, Ge(1)] | None = None
    validation_limit: Annotated[int, Ge(1)] | None = 96


@dataclass(frozen=True)
class _Plugins:
    """A kind of plug-in that a section of the configuration selects.

    Attributes:
        package: Package with `find`.
        default: Name of the default plug-in.
        sharing: Function that returns further `Config` classes whose settings the section may also hold.
        key: Setting that names the plug-in.
        is_optional: True when a configuration without the section has none.
    """

    package: Any
    default: str
    sharing: Callable[[], tuple[type, ...]] = tuple
    key: str = "name"
    is_optional: bool = False


_PLUGINS = {
    "editor": _Plugins(editors, "wise"),
    "objective": _Plugins(objectives, objectives.DEFAULT, objectives.configs),
    "commit": _Plugins(ways, ways.DEFAULT, key="way", is_optional=True),
}


@dataclass(frozen=True)
class Choice:
    """A selected plug-in and its settings. In YAML: `name` (or `way`) and the settings, side by side.

    Attributes:
        name: Name of a file in the plug-ins' folder, or a dotted module.
        settings: Instance of the plug-in's `Config`.
        others: Settings of the section that only other plug-ins of its kind have, by name.
        given: Names of the settings set by the user; the others may be fitted to the model.
        key: Setting that names the plug-in.
    """

    name: str
    settings: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = field(default=frozenset(), compare=False)
    key: str = "name"

    def own_values(self) -> dict[str, Any]:
        """The name and the plug-in's own settings, as plain values."""
        return {self.key: self.name, **dataclasses.asdict(self.settings)}

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings of an objective's section that cannot change an edit, each with the reason."""
        unread = dict.fromkeys(self.others, f"the objective {self.name!r} does not have this setting")
        return {**unread, **self.settings.without_effect}

    def to_dict(self) -> dict[str, Any]:
        """The whole section, as plain values."""
        return self.own_values() | {name: _plain(value) for name, value in self.others.items()}


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
        seed: Seed of the run. An edit's random numbers depend on it and on the edit's id.
        keep_edits: True writes every edit to `out/edits`. A comparison of settings may need the scores only.
        out: Folder or address of the results.
        commit: Way of making one model of all records; None: every record is an edit of its own.
        preset: Settings by model (`odedit presets`), which stand where the file and the command line give none.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    supervision: Supervision = field(default_factory=Supervision)
    editor: Choice = field(default_factory=lambda: _choice("editor", {}, []))
    objective: Choice = field(default_factory=lambda: _choice("objective", {}, []))
    stopping: Stopping = field(default_factory=Stopping)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    commit: Choice | None = None
    seed: int = 0
    keep_edits: bool = True
    out: str = "out"
    preset: str | None = None

    @property
    def name(self) -> str:
        """Name of the run: `tracking.run_name`, or the last part of `out`."""
        path = self.out.partition("?")[0] if "://" in self.out else os.path.abspath(os.path.expanduser(self.out))
        return self.tracking.run_name or Path(path).name

    @property
    def commit_way(self) -> str:
        """Name of the way; "" for a run of single edits."""
        return "" if self.commit is None else self.commit.name

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as plain values of JSON."""
        values = {name: getattr(self, name) for name in _names()}
        plain = {
            name: value.to_dict() if isinstance(value, Choice) else _plain(value)
            for name, value in values.items()
            if not (name in _PLUGINS and value is None)
        }
        return json.loads(json.dumps(plain))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _names() -> list[str]:
    return [item.name for item in dataclasses.fields(RunConfig)]


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def load(path: LocationLike | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML, applies `key.sub=value` overrides, and validates the result.

    Raises:
        InputError: The file is missing or not YAML, or settings are wrong; one line for each.
    """
    values = {} if path is None else read_yaml(path)
    for text in overrides:
        apply_override(values, text)
    config = from_dict(values)
    return replace(config, backbone=config.backbone.with_family)


def load_commit(path: LocationLike | None, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load`, for a run that commits its records to one model: its way's defaults stand where the user gives none.

    Raises:
        InputError: See `load`.
    """
    values = {} if path is None else read_yaml(path)
    for text in overrides:
        apply_override(values, text)
    config = commit_from_dict(values)
    return replace(config, backbone=config.backbone.with_family)


def commit_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """As `from_dict`, with the defaults of `load_commit`."""
    section = values.get("commit")
    way = section.get("way") if isinstance(section, Mapping) else None
    try:
        defaults = ways.find(ways.DEFAULT if way is None else str(way)).defaults
    except InputError as error:
        raise InputError(f"commit.way: {error}") from error
    completed = {name: _with_defaults(values.get(name), own) for name, own in defaults.items()}
    config = from_dict({**values, "commit": {} if section is None else section, **completed})
    # Defaults are no choice of the user, and may be fitted to the model.
    editor = values.get("editor")
    given = frozenset(editor) - {"name"} if isinstance(editor, Mapping) else frozenset()
    # The model is the result; single edits that a way uses are kept in a run of their own.
    return replace(config, editor=replace(config.editor, given=given), keep_edits=False)


def _with_defaults(section: Any, defaults: Mapping[str, Any]) -> Any:
    """The section with the defaults beside its own settings, unless it names another plug-in."""
    if section is None:
        return dict(defaults)
    if not isinstance(section, Mapping) or section.get("name", defaults.get("name")) != defaults.get("name"):
        return section
    return {**defaults, **section}


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The run described by a mapping from YAML. Raises InputError with a line for each mistake."""
    values = presets.completed(values, _PLUGINS["editor"].default)
    problems: list[str] = []
    sections = {key: value for key, value in values.items() if key not in _PLUGINS}
    accepted: dict[str, Any] = {
        kind: _choice(kind, values.get(kind), problems)
        for kind, options in _PLUGINS.items()
        if not options.is_optional or values.get(kind) is not None
    }
    try:
        run = strict.build(RunConfig, sections)
        accepted |= {name: getattr(run, name) for name in _names() if name not in _PLUGINS}
        _check_family(run.backbone.family, problems)
    except InputError as error:
        problems.extend(str(error).splitlines())
    strict.raise_problems(problems)
    run = RunConfig(**accepted)
    if Path(run.backbone.checkpoint).expanduser().is_dir():  # an id of the hub may need a download: `load` asks for it
        run = replace(run, backbone=run.backbone.with_family)
    run.objective.settings.check(editors.find(run.editor.name)(run.editor.settings))
    return run


def _check_family(name: str, problems: list[str]) -> None:
    if name and "." not in name:
        try:
            backbones.find(name)
        except InputError as error:
            problems.append(f"backbone.family: {error}")


def _choice(kind: str, section: Any, problems: list[str]) -> Choice:
    """The plug-in of a section and its settings.

    Args:
        kind: Name of the section, a key of `_PLUGINS`.
        problems: List that mistakes are appended to.
    """
    options = _PLUGINS[kind]
    if not isinstance(section, Mapping | None):
        problems.append(
            f"{kind}: got {strict.show(section)}, expected a section with {options.key!r} and the {kind}'s settings."
        )
    given = dict(section) if isinstance(section, Mapping) else {}
    name = str(given.pop(options.key, options.default))
    try:
        own = options.package.find(name).Config
    except InputError as error:
        problems.append(f"{kind}.{options.key}: {error}")
        return Choice(name, None)
    others = options.sharing()
    parts, unknown = plugins.by_config(given, own, others)
    known = [item.name for part in parts for item in dataclasses.fields(part)]
    problems += [strict.unknown_key(f"{kind}.{key}", str(key), {*known, options.key}) for key in unknown]
    built = {}
    for config_class, values in parts.items():
        try:
            built[config_class] = strict.build(config_class, values, kind)
        except InputError as error:
            # Objectives share settings; report a wrong value once.
            problems += [line for line in str(error).splitlines() if line not in problems]
    if len(built) < len(parts):
        return Choice(name, None)
    own_names = {item.name for item in dataclasses.fields(own)}
    return Choice(
        name,
        built[own],
        {
            item.name: getattr(built[other], item.name)
            for other in others
            for item in dataclasses.fields(other)
            if item.name not in own_names
        },
        frozenset(given),
        options.key,
    )


class _Loader(yaml.SafeLoader):
    """Loader with the numbers of YAML 1.2, such as `1e-3`, that rejects repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise InputError(f"key {key!r} is given twice{key_node.start_mark}.".replace("\n", " "))
            seen.add(str(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # Match the whole text: `10.0.0.2:6379` starts like a number.
    re.compile(r"^(?:[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)|[-+]?\d+\.\d*|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def read_yaml(path: LocationLike) -> dict[str, Any]:
    """The mapping in a YAML file, or {} if it is empty. Raises InputError for any other content."""
    location = at(path, "--config")
    try:
        text = location.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{location.text}: the configuration cannot be read: {why}.") from error
    values = _parse(text, location.text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(
            f"{location.text}: got {strict.show(values)}, expected sections such as 'editor:' and 'data:'."
        )
    return values


def _parse(text: str, where: str) -> Any:
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: this is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where}: this is not valid YAML.") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except ValueError as error:  # an impossible date, or a number of thousands of digits
        raise InputError(f"{where}: a value cannot be read: {error}.") from error
    if _count(values) > MAX_VALUES:
        raise InputError(f"{where}: it holds more than {MAX_VALUES:,} values, aliases expanded (or one holds itself).")
    return values


def _count(values: Any) -> int:
    """Number of values, with aliases expanded; counts to `MAX_VALUES` + 1 at most."""
    stack, number = [values], 0
    while stack and number <= MAX_VALUES:
        value = stack.pop()
        number += 1
        if isinstance(value, list | tuple | set | frozenset):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
    return number


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one value, given as `key.sub=value`, in a mapping from YAML. Raises InputError if it is malformed."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(f"{override!r}: expected key.sub=value, for example editor.max_steps=20.")
    section = values
    for depth, part in enumerate(parts[:-1]):
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise InputError(f"{override!r}: {'.'.join(parts[: depth + 1])} is not a section.")
        section = inner
    section[parts[-1]] = _parse(text, repr(override))
