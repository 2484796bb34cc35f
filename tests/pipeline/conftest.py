"""Fixtures: small inputs, and the whole pipeline in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.run import Outcome, run
from tests.support import inline_pipeline
from tests.support.mmedit_files import record, write_array, write_images

QUIET = Console(quiet=True)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A configuration with five records, whose files exist."""
    records = [record(number) for number in range(5)]
    image_root, rephrase_root = write_images(tmp_path, records)
    return {
        "data": {
            "path": str(write_array(tmp_path / "vqa_eval.json", records)),
            "image_root": str(image_root),
            "rephrase_root": str(rephrase_root),
        },
        "supervision": {"locality_source": "record"},
        "editor": {"name": "wise", "site": "layers.2.ffn.in", "max_steps": 2},
        "pipeline": {"batch_size": 2},
        "tracking": {"enabled": False},
        "out": str(tmp_path / "out"),
    }


@pytest.fixture
def config(settings: dict[str, Any]) -> RunConfig:
    return from_dict(settings)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], Outcome]:
    """Function that runs a configuration in this process, stage by stage."""

    inline_pipeline.install(monkeypatch)
    return lambda config: run(config, QUIET)
