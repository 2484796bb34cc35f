"""The demo: WISE under several objectives on the embedded benchmark, compared edit by edit, and one model of all."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from odedit.errors import counted
from odedit.evaluation.statistics import Estimate
from odedit.storage.location import at, locate
from pipeline.config.run import RunConfig, commit_from_dict, from_dict, read_yaml
from pipeline.console import open_page, say
from pipeline.driver.commit import commit_many
from pipeline.driver.run import Outcome, run
from pipeline.interrupts import terminate_as_interrupt
from pipeline.report import attribution, page
from pipeline.report.formatting import plus_minus
from pipeline.run_folder.committed import read_edits
from pipeline.run_folder.sources import build_embedded, embedded_name
from pipeline.study import data
from pipeline.tracking.connection import open_command
from pipeline.workers import ray_session

NATIVE, CONTROL, CONTRAST = "WISE", "WISE + rephrase", "WISE + contrast"
ODEDIT = "WISE + ODEdit"
ARMS = {
    NATIVE: "demo-wise",
    CONTROL: "demo-wise-rephrase",
    "WISE, own terms + rephrase": "demo-wise-own-rephrase",
    ODEDIT: "demo-wise-odedit",
    CONTRAST: "demo-wise-contrast",
}
MODELS = {"joint": "demo-one-model-joint", "sum": "demo-one-model-sum"}
_SHOWN = {"m_gen": "image generality", "m_loc_near": "near locality", "kept": "other answers kept"}


def arm_config(name: str, out: Path, section: Mapping[str, Any]) -> RunConfig:
    """The shipped configuration of one arm or model, in the demo's folder.

    Args:
        name: Name of the file.
        out: The demo's folder.
        section: Section `data`.
    """
    values = read_yaml(Path(__file__).parent / "configs" / f"{name}.yaml")
    values |= {"data": dict(section), "out": str(out / name.removeprefix("demo-"))}
    return commit_from_dict(values) if "commit" in values else from_dict(values)


def records_section(out: Path) -> dict[str, Any]:
    """Section `data` of the evaluation records, every fact once before any a second time.

    Two edits of a fact contradict each other in one model.

    Args:
        out: The demo's folder, where the benchmark is written.
    """
    world = out / embedded_name()
    build_embedded(world)
    file = out / "evaluation-by-turns.json"
    data.write_json(at(file), data.by_turns(json.loads((world / "evaluation.json").read_text(encoding="utf-8"))))
    roots = {"image_root": "images", "rephrase_root": "images_rephrase", "pool": "train.json"}
    return {"path": str(file)} | {name: str(world / part) for name, part in roots.items()}


def main(out: Path, edits: int, *, fresh: bool, opens: bool = True) -> None:
    """Runs or resumes the arms and the models, prints the comparisons, and the locations of the results.

    Args:
        opens: Whether the report is opened in a browser where there is a desktop.
    """
    errors, console = Console(stderr=True), Console()
    section = records_section(out.absolute()) | {"limit": edits}
    arms, uri = [], None
    with terminate_as_interrupt(), ray_session.shared():
        for name, file in ARMS.items():
            errors.print(f"[bold]{name}[/bold]", highlight=False)
            outcome = run(arm_config(file, out, section), errors, fresh=fresh)
            arms.append(page.Arm(name, outcome.workspace, outcome.summary))
            uri = outcome.tracking_uri
        errors.print("[bold]One model of all facts[/bold]", highlight=False)
        models = commit_many([arm_config(file, out, section) for file in MODELS.values()], errors, fresh=fresh)
    of_models = {f"one model, {name}": outcome.workspace for name, outcome in zip(MODELS, models, strict=True)}
    block = _block(dict(zip(MODELS, models, strict=True)))
    report = page.write_comparison(locate(str(out), "--out"), arms, of_models, block)
    rows = {arm.name: arm.rows() for arm in arms}
    for line in attribution.sentences(rows, NATIVE, CONTROL, (ODEDIT, CONTRAST)):
        say(console, line)
    for arm in arms[1:]:
        console.print(page.comparison_table(arms[0], arm))
    for arm in arms:
        console.print(f"{arm.name}: {page.counts(arm.summary)}", highlight=False)
    console.print(page.block_table(block))
    lines = [f"Report:  {report}", *(f"         {each.report} ({name})" for name, each in of_models.items())]
    lines.append(f"Results: {', '.join(str(arm.workspace.out) for arm in arms)}")
    if uri is not None:
        lines.append(f"MLflow:  {open_command(uri)}")
    for line in (*lines, *_asking(models[0], Path(section["image_root"]))):
        say(console, line)
    if opens:
        open_page(str(report))


def _block(models: Mapping[str, Outcome]) -> page.Block:
    """The models of one set of facts, one per line."""
    lines = []
    for name, outcome in models.items():
        edits = read_edits(outcome.workspace.model)
        figures = outcome.summary["metrics"] | {"kept": outcome.summary.get("kept")}
        cells = [plus_minus(Estimate(**figures[column])) if figures.get(column) else "-" for column in _SHOWN]
        lines.append([name, f"{sum(edit['holds'] for edit in edits)} of {len(edits)}", *cells])
    facts = counted(next(iter(models.values())).summary["n"], "fact")
    return page.Block(
        title=f"One model of {facts}, by way",
        heads=("way", "edits that hold", *_SHOWN.values()),
        lines=lines,
        caption="Edits that hold: whole generated answers. Mean \u00b1 half its 95% interval.",
    )


def _asking(model: Outcome, image_root: Path) -> list[str]:
    """Lines with the command that asks the model a question of the first edit that holds, and its answers."""
    edits = read_edits(model.workspace.model)
    edit = next((edit for edit in edits if edit["holds"]), edits[0])
    # Strings in double quotes, since the shell's are single ones.
    folder, picture, question = (
        json.dumps(str(text)) for text in (model.workspace.model, image_root / edit["image"], edit["prompt"])
    )
    program = f"from odedit import load_edited; print(load_edited({folder}).answer({picture}, {question}))"
    return [
        f"Model:   {model.workspace.model}; it answers {edit['answer_after']!r} instead of {edit['answer_before']!r}:",
        f"         {shlex.join([sys.executable, '-c', program])}",
    ]
