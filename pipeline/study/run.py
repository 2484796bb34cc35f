"""Runs a study: draws its records, trains what has to be trained, edits all arms, and writes what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from odedit import editors
from odedit.errors import InputError
from pipeline import local_ray, results, tracking, training
from pipeline.config import RunConfig
from pipeline.run import Outcome, run_many, terminate_as_interrupt
from pipeline.study import data, plots, states, tables
from pipeline.study.spec import Arm, StudyConfig, arms, run_config
from pipeline.version import code_version
from pipeline.workspace import read_json, write_atomically, write_json, write_text


@dataclass(frozen=True)
class Finished:
    """What a study left behind.

    Attributes:
        cells: Every arm on every task.
        markdown: The tables.
        files: What was written.
        tracking_uri: MLflow store, or None.
    """

    cells: Sequence[tables.Cell]
    markdown: str
    files: Sequence[Path]
    tracking_uri: str | None


def run(name: str, study: StudyConfig, out: Path, console: Console, *, fresh: bool = False) -> Finished:
    """Runs or resumes a study in `out`.

    Raises:
        InputError: An arm's settings are wrong, or `out` cannot be used.
    """
    every = arms(study)
    _check_folder(out, name)
    section = data.write(study.draw, out / "data") if study.draw is not None else None
    configs = [run_config(arm, out, section) for arm in every]
    _check_folders(every)
    with terminate_as_interrupt(), local_ray.shared():
        configs = [_with_weights(config, arm, out, console) for config, arm in zip(configs, every, strict=True)]
        parent = _open_parent(name, study, out, configs[0])
        try:
            named = [_named(config, arm, out) for config, arm in zip(configs, every, strict=True)]
            outcomes = run_many(named, console, fresh=fresh, parent_run=parent.run_id if parent else None)
            found = _write(name, study, every, outcomes, out, console)
            if parent is not None:
                parent.log_study(found.files, metrics_of(found.cells))
        except BaseException as error:
            if parent is not None:
                parent.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        if parent is not None:
            parent.finish("FINISHED")
    return found


def _check_folder(out: Path, name: str) -> None:
    """Raises InputError if `out` belongs to something else."""
    state = read_json(out / "study.json")
    if state is None and out.exists() and any(out.iterdir()):
        raise InputError(f"--out: {out} is not empty and holds no study. Choose another folder.")
    if state is not None and state.get("study") != name:
        raise InputError(f"--out: {out} holds the study {state.get('study')!r}, not {name!r}. Choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", (state or {}) | {"study": name})


def _check_folders(every: Sequence[Arm]) -> None:
    seen: dict[str, str] = {}
    for arm in every:
        if arm.folder in seen:
            raise InputError(f"axes: {seen[arm.folder]!r} and {arm.name!r} would share the folder {arm.folder!r}.")
        seen[arm.folder] = arm.name


def _named(config: RunConfig, arm: Arm, out: Path) -> RunConfig:
    """In the study's own store unless another is given, under the arm's name."""
    uri = config.tracking.uri or f"sqlite:///{(out / 'mlflow.db').absolute().as_posix()}"
    return replace(config, tracking=replace(config.tracking, uri=uri, run_name=arm.name))


def _with_weights(config: RunConfig, arm: Arm, out: Path, console: Console) -> RunConfig:
    """The run with trained weights, for an editor that learns before it edits and was given none."""
    kind = editors.find(config.editor.name)
    settings = config.editor.settings
    if not hasattr(kind, "native_training_loss") or settings.checkpoint is not None:
        return config
    depends_on = {
        "editor": asdict(settings),
        "backbone": asdict(config.backbone),
        "training": asdict(config.training),
        "supervision": asdict(config.supervision),
        "objective": asdict(config.objective) if kind.trains_with_objective else None,
        "seed": config.seed,
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:10]
    # Beside the studies, which may share them.
    path = out.absolute().parent / "weights" / f"{config.editor.name}-{key}.safetensors"
    if not path.exists():
        console.print(f"[bold]Training {config.editor.name}[/bold] for {arm.name}", highlight=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        training.run(replace(config, out=str(path.with_suffix(""))), path, console, fresh=False)
    return replace(config, editor=replace(config.editor, settings=replace(settings, checkpoint=str(path.absolute()))))


def _open_parent(name: str, study: StudyConfig, out: Path, config: RunConfig) -> tracking.StudyRun | None:
    if not config.tracking.enabled:
        return None
    state = read_json(out / "study.json") or {}
    uri = config.tracking.uri or f"sqlite:///{(out / 'mlflow.db').absolute().as_posix()}"
    parent = tracking.StudyRun.start(
        uri,
        config.tracking.experiment,
        name,
        json.loads(json.dumps(asdict(study))),
        state.get("run_id"),
        code_version(),
    )
    write_json(out / "study.json", state | {"run_id": parent.run_id})
    return parent


def _write(
    name: str, study: StudyConfig, every: Sequence[Arm], outcomes: Sequence[Outcome], out: Path, console: Console
) -> Finished:
    rows = {
        arm.folder: list(results.read_rows(results.parts(outcome.workspace)))
        for arm, outcome in zip(every, outcomes, strict=True)
    }
    found = tables.cells(study, every, rows)
    tables_of = [tables.to_markdown(study, found, columns) for columns in (study.columns, study.further) if columns]
    if study.correlate is not None:
        tables_of.append(tables.correlations(study, every, rows))
    texts = [f"# {study.title}", *tables_of, tables.legend(study), *([study.note.strip()] if study.note else [])]
    markdown = "\n\n".join(text.strip() for text in texts) + "\n"
    write_text(out / "table.md", markdown)
    write_text(out / "table.csv", tables.to_csv(study, found))
    is_of_states = study.plot.kind == "states"
    image = states.draw(study, every, outcomes, console) if is_of_states else plots.draw(study, found)
    write_atomically(out / "plot.png", lambda temporary: temporary.write_bytes(image))
    uri = next((outcome.tracking_uri for outcome in outcomes if outcome.tracking_uri), None)
    return Finished(found, markdown, [out / "table.md", out / "table.csv", out / "plot.png"], uri)


def metrics_of(cells: Sequence[tables.Cell]) -> Mapping[str, float]:
    """`<arm>/<task>/<column>`, for the parent's page in MLflow."""
    return {
        f"{cell.arm.folder}/{cell.task}/{column}": mean.mean for cell in cells for column, mean in cell.means.items()
    }


def describe(found: Finished, out: Path) -> list[str]:
    """Where everything is, line by line."""
    lines: list[Any] = [f"Tables:  {out / 'table.md'}, {out / 'table.csv'}", f"Picture: {out / 'plot.png'}"]
    if found.tracking_uri is not None:
        lines.append(f"MLflow:  {tracking.open_command(found.tracking_uri)}")
    return lines
