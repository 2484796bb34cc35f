"""The command `odedit tune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from odedit.errors import InputError
from odedit.runtime.addresses import below, masked
from pipeline.console import say
from pipeline.tracking.connection import open_command
from tune import config as search_config
from tune import run as runner
from tune.folder import resumed


def tune(path: Path | None, overrides: Sequence[str], out: str | None, resume: str | None) -> None:
    """Runs or resumes a search and prints its summary."""
    if resume is not None and out is not None:
        raise InputError("--resume, --out: give one of them; a search that is resumed stays in its folder.")
    errors = Console(stderr=True)
    if resume is not None and path is None:
        config = resumed(resume, list(overrides))
    else:
        config = search_config.load(path, overrides)
    folder = resume or out or f"searches/{path.stem if path is not None else 'demo'}"
    finished = runner.run(config, folder, errors, resume=resume is not None)
    print(finished.markdown)
    lines = [f"Best settings: odedit edit --config {below(masked(folder), 'best.yaml')}"]
    lines.append(f"Search:        {masked(folder)} (summary.md, summary.json, trials.csv, pictures)")
    if finished.tracking_uri is not None:
        lines.append(f"MLflow:        {open_command(finished.tracking_uri)}")
    for line in lines:
        say(errors, line)
