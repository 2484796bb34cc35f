"""The demo: WISE under three objectives on the embedded benchmark, compared edit by edit."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from odedit.storage.location import locate
from pipeline.config.run import RunConfig, from_dict, read_yaml
from pipeline.console import say
from pipeline.driver.run import run
from pipeline.interrupts import terminate_as_interrupt
from pipeline.report import page
from pipeline.tracking.client import open_command
from pipeline.workers import ray_session

ARMS = {"WISE": "demo-wise", "WISE + ODEdit": "demo-wise-odedit", "WISE + contrast": "demo-wise-contrast"}


def arm_config(name: str, out: Path, edits: int) -> RunConfig:
    """The shipped configuration of one arm, with the demo's folder and number of edits."""
    values = read_yaml(Path(__file__).parent / "configs" / f"{name}.yaml")
    values["data"] = {**values.get("data", {}), "limit": edits}
    return from_dict(values | {"out": str(out / name.removeprefix("demo-"))})


def main(out: Path, edits: int, *, fresh: bool) -> None:
    """Runs or resumes the arms, prints the comparison, and the locations of the results."""
    errors, console = Console(stderr=True), Console()
    configs = {name: arm_config(file, out, edits) for name, file in ARMS.items()}
    arms, uri = [], None
    with terminate_as_interrupt(), ray_session.shared():
        for name, config in configs.items():
            errors.print(f"[bold]{name}[/bold]", highlight=False)
            outcome = run(config, errors, fresh=fresh)
            arms.append(page.Arm(name, outcome.workspace, outcome.summary))
            uri = outcome.tracking_uri
    report = page.write_comparison(locate(str(out), "--out"), arms)
    for arm in arms[1:]:
        console.print(page.comparison_table(arms[0], arm))
    for arm in arms:
        console.print(f"{arm.name}: {page.counts(arm.summary)}", highlight=False)
    lines = [f"Report:  {report}", f"Results: {', '.join(str(arm.workspace.out) for arm in arms)}"]
    if uri is not None:
        lines.append(f"MLflow:  {open_command(uri)}")
    for line in lines:
        say(console, line)
