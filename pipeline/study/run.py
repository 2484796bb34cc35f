"""Run of a study: draws the records, trains the editors' weights, edits all arms, writes tables and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from odedit.errors import InputError, NothingUsable
from odedit.runtime.addresses import above, below
from odedit.storage.location import Location, at
from pipeline.config.run import RunConfig
from pipeline.config.version import code_version
from pipeline.console import say
from pipeline.driver.commit import check as check_commit
from pipeline.driver.commit import commit_many
from pipeline.driver.preflight import check, check_records
from pipeline.driver.run import Outcome, run_many
from pipeline.interrupts import interrupts_delayed, terminate_as_interrupt
from pipeline.run_folder import rows as results
from pipeline.run_folder.reasons import Reasons, lines
from pipeline.run_folder.sources import absolute
from pipeline.run_folder.workspace import Workspace, check_access, new_local_folder, read_json, write_json
from pipeline.study import comparisons, data, fronts, plots, states, tables
from pipeline.study.spec import SEED, Arm, StudyConfig, run_config, runs
from pipeline.tracking.client import status_after
from pipeline.tracking.connection import open_command, store_uri
from pipeline.tracking.studies import StudyRun
from pipeline.training import many
from pipeline.workers import ray_session

_STATE = "study.json"


@dataclass(frozen=True)
class Finished:
    """Results of a study.

    Attributes:
        cells: Every arm on every task.
        markdown: Text of `table.md`.
        files: Files that were written.
        tracking_uri: MLflow store, or None.
    """

    cells: Sequence[tables.Cell]
    markdown: str
    files: Sequence[Location]
    tracking_uri: str | None


def run(
    name: str, study: StudyConfig, out: Path | str, console: Console, *, fresh: bool = False, command: str | None = None
) -> Finished:
    """Runs or resumes a study.

    Args:
        name: Name of a shipped study.
        study: Settings of the study.
        out: Folder or address.
        console: Console for progress.
        fresh: Start over.
        command: The command, written at the head of `table.md`; None: `odedit study NAME`.

    Raises:
        InputError: An arm's settings are wrong, or `out` cannot be used.
        NothingUsable: No record was edited.
    """
    every = runs(study)
    folder = at(out, "--out")
    _check_folder(folder, name)
    _check_arms(
        [_named(run_config(part, out, None), part, out) for part, _ in every],
        is_drawn=study.draw is not None,
        fresh=fresh,
    )
    with terminate_as_interrupt(), ray_session.shared():
        parent = None
        try:
            with new_local_folder(folder):
                # A study whose records cannot be drawn must leave no state behind.
                sections = _drawn(study, [part for part, _ in every], below(str(out), "data"))
                write_json(folder / _STATE, _state(folder) | {"study": name})
                configs = [
                    _named(run_config(part, out, section), part, out)
                    for (part, _), section in zip(every, sections, strict=True)
                ]
                with interrupts_delayed():  # else the run would be created, and not be known here
                    parent = _open_parent(name, study, folder, configs[0], fresh=fresh)
            # Studies beside this one share its weights.
            weights = below(above(absolute(str(out))), "weights")
            configs = many.with_weights(configs, [part.name for part, _ in every], weights, console)
            work = run_many if study.models is None else commit_many
            outcomes = work(configs, console, fresh=fresh, parent_run=parent.run_id if parent else None)
            of_arms = [arm for _, arm in every]
            finished = _write(study, of_arms, outcomes, folder, console, command or f"odedit study {name}")
            if parent is not None:
                parent.log_study(finished.files, tables.to_table(study, finished.cells), finished.markdown)
        except BaseException as error:
            if parent is not None:
                parent.finish(status_after(error), error)
            raise
        if parent is not None:
            parent.finish("FINISHED")
    return finished


def _drawn(study: StudyConfig, parts: Sequence[Arm], folder: str) -> list[dict[str, Any] | None]:
    """Section `data` of each run; a run with a seed of its own has that seed's records.

    Raises:
        InputError: The split has too few records.
    """
    draw = study.draw
    if draw is None:
        return [None] * len(parts)
    seeds = [(int(part.labels[SEED]),) if study.models is not None else draw.seeds for part in parts]
    at_least = max(study.models.sizes) if study.models is not None else 0
    sections = {of: data.write(replace(draw, seeds=of), folder, at_least) for of in dict.fromkeys(seeds)}
    return [sections[of] for of in seeds]


def _check_folder(out: Location, name: str) -> None:
    """Raises InputError if `out` holds anything but this study, or cannot be written to."""
    check_access(out, "--out")
    if out.is_file():
        raise InputError(f"--out: {out} is a file. Choose a folder.")
    state = _state(out)
    if not state and out.names():
        raise InputError(f"--out: {out} is not empty and holds no study. Choose another folder.")
    if state and state.get("study") != name:
        raise InputError(f"--out: {out} holds the study {state.get('study')!r}, not {name!r}. Choose another folder.")


def _check_arms(configs: Sequence[RunConfig], *, is_drawn: bool, fresh: bool) -> None:
    """Raises InputError if an arm cannot run, before anything is written and before hours of training."""
    is_finished = not fresh and all(Workspace.of(config.out).summary.exists() for config in configs)
    servers: set[str] = set()
    inputs: set[str] = set()
    for config in configs:
        server = repr((config.pipeline, config.tracking.uri, config.tracking.experiment))
        read = repr((config.data, config.supervision, config.objective.name))
        try:
            asks = not is_finished and server not in servers
            if config.commit is not None:
                check_commit(config, None)
            checked, *_ = check(config, fresh=fresh, trains=True, servers=asks, is_storage_tried=True)
            if not is_drawn and read not in inputs:
                check_records(checked)
        except InputError as error:
            raise InputError(f"{config.name}: {error}") from error
        servers.add(server)
        inputs.add(read)


def _state(out: Location) -> dict[str, Any]:
    """Content of study.json; empty if there is none or it is no study's."""
    state = read_json(out / _STATE)
    return state if isinstance(state, dict) else {}


def _named(config: RunConfig, arm: Arm, out: Path | str) -> RunConfig:
    """The run with the arm's name in MLflow, and the study's own store unless another is set.

    Raises:
        InputError: `out` is an address, and no store is given.
    """
    uri = store_uri(config.tracking, at(out) / "arms") if config.tracking.enabled else config.tracking.uri
    return replace(config, tracking=replace(config.tracking, uri=uri, run_name=arm.name))


def _open_parent(name: str, study: StudyConfig, out: Location, config: RunConfig, *, fresh: bool) -> StudyRun | None:
    if not config.tracking.enabled:
        return None
    state = _state(out)
    parent = StudyRun.start(
        store_uri(config.tracking, out),
        config.tracking.experiment,
        name,
        json.loads(json.dumps(asdict(study))),
        None if fresh else state.get("run_id"),  # a fresh start has new child runs
        code_version(),
    )
    write_json(out / _STATE, state | {"run_id": parent.run_id})
    return parent


def _write(
    study: StudyConfig,
    of_arms: Sequence[Arm],
    outcomes: Sequence[Outcome],
    out: Location,
    console: Console,
    command: str,
) -> Finished:
    """Writes tables and picture.

    Args:
        of_arms: Arm of each outcome; several outcomes of one arm are averaged.
    """
    every = list({arm.folder: arm for arm in of_arms}.values())
    rows: dict[str, list[results.Row]] = {arm.folder: [] for arm in every}
    kept: dict[str, list[results.Row]] = {arm.folder: [] for arm in every}
    for arm, outcome in zip(of_arms, outcomes, strict=True):
        rows[arm.folder] += results.read_rows(results.parts(outcome.workspace))
        kept[arm.folder] += results.read_kept(outcome.workspace)
    cells = tables.cells(study, every, rows, kept)
    blocks = [tables.to_markdown(study, cells, columns) for columns in (study.columns, study.further) if columns]
    if study.correlate is not None:
        blocks.append(tables.correlations(study, every, rows))
    files = ["table.md", "table.csv", "plot.png"]
    if study.fronts is not None:
        levels = fronts.levels(study, every, rows)
        blocks.insert(0, fronts.to_markdown(study, levels))
        (out / "fronts.csv").write_text(fronts.to_csv(levels))
        files.insert(1, "fronts.csv")
    if study.compared:
        compared = comparisons.comparisons(study, every, rows)
        blocks.insert(0, comparisons.to_markdown(study, compared))
        (out / "comparisons.csv").write_text(comparisons.to_csv(study, compared))
        files.insert(1, "comparisons.csv")
    blocks[:0] = comparisons.attributed(study, every, rows)
    markdown = _markdown(study, blocks, outcomes, command)
    (out / "table.md").write_text(markdown)
    (out / "table.csv").write_text(tables.to_csv(study, cells))
    if not any(cell.n for cell in cells):
        raise NothingUsable(
            f"No record was edited:\n{_reasons(rows)}\nThe rows under {out / 'arms'} say why, arm by arm."
        )
    wanted = dict.fromkeys((*study.columns, *study.further, *study.plot.columns))
    unknown = [column for column in wanted if not any(column in cell.means for cell in cells)]
    if unknown:
        say(console, f"Note: no edit has the columns {', '.join(unknown)}.")
    is_of_states = study.plot.kind == "states"
    image = states.draw(study, every, outcomes, console) if is_of_states else plots.draw(study, cells)
    (out / "plot.png").write_bytes(image)
    uri = next((outcome.tracking_uri for outcome in outcomes if outcome.tracking_uri), None)
    return Finished(cells, markdown, [out / file for file in files], uri)


def _markdown(study: StudyConfig, blocks: Sequence[str], outcomes: Sequence[Outcome], command: str) -> str:
    """Text of `table.md`: title, command, version of the code that ran the arms, tables and legend."""
    versions = dict.fromkeys(str(outcome.summary.get("code", "unknown")) for outcome in outcomes)
    texts = [f"# {study.title}", f"    {command}\n\nCode: odedit {', '.join(versions)}", *blocks, tables.legend(study)]
    return "\n\n".join(text.rstrip() for text in (*texts, study.note.strip()) if text) + "\n"


def _reasons(rows: Mapping[str, Sequence[results.Row]]) -> str:
    """The commonest reasons why records were not edited."""
    reasons = Reasons()
    for row in chain.from_iterable(rows.values()):
        reasons.add(row)
    return lines(reasons.commonest())


def describe(finished: Finished, out: Location) -> list[str]:
    """Lines that say where the results are."""
    tables_of = ", ".join(str(file) for file in finished.files if file.name != "plot.png")
    text = [f"Tables:  {tables_of}", f"Picture: {out / 'plot.png'}"]
    if finished.tracking_uri is not None:
        text.append(f"MLflow:  {open_command(finished.tracking_uri)}")
    return text
