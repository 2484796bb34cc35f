"""A small run in the command's own process: rows as Ray's workers give them, and the process as it was."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from odedit.errors import InputError
from odedit.runtime.process import configure_process
from pipeline.config.run import BackboneConfig, PipelineConfig, from_dict
from pipeline.driver.run import run
from pipeline.run_folder import rows
from pipeline.workers import in_process, model, ray_session
from pipeline.workers.plan import GROUPS_PER_ACTOR, Plan, local_plan
from tests.pipeline.conftest import QUIET
from tests.support.paths import ROOT
from tests.support.rows import NOT_REPRODUCIBLE


def plan_of(num_groups: int, **settings: Any) -> Plan:
    return local_plan(PipelineConfig(device="cpu", **settings), BackboneConfig(), num_groups)


def test_few_groups_need_no_worker_unless_a_number_is_set() -> None:
    assert plan_of(1).in_process and plan_of(GROUPS_PER_ACTOR).in_process
    assert not plan_of(GROUPS_PER_ACTOR + 1).in_process
    assert not plan_of(1, actors=1).in_process, "a worker of its own, which is started again after a crash"
    assert str(plan_of(1)) == "this process on cpu with 1 thread"


def test_a_cluster_is_used_however_few_groups_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, variable in (({"ray_address": "127.0.0.1:1"}, ""), ({}, "127.0.0.1:1")):
        monkeypatch.setenv("RAY_ADDRESS", variable)
        with (
            pytest.raises(InputError, match=r"127\.0\.0\.1:1"),
            ray_session.connected(PipelineConfig(**settings), BackboneConfig(), 1),
        ):
            pass


def test_the_process_is_afterwards_as_it_was(settings: dict[str, Any]) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), list(warnings.filters)
    config = from_dict(settings)
    seen = []
    with in_process.as_worker():
        configure_process(before[0] + 1, "cpu")
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
    assert seen == [(before[0] + 1, True)]
    assert run(config, QUIET).summary["n"] == 5
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), list(warnings.filters)) == before
    assert not model._loaded, "the model is freed"


_WITHOUT_RAY = """
import sys
from odedit.__main__ import app
try:
    app(["edit", "--config", sys.argv[1]])
finally:
    assert "ray" not in sys.modules and "scipy.stats" not in sys.modules
"""


def test_a_small_run_imports_no_ray_and_says_what_a_worker_says(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings | {"pipeline": {"batch_size": 2}}))
    ended = subprocess.run(
        [sys.executable, "-c", _WITHOUT_RAY, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert "Plan: this process on cpu" in ended.stderr
    assert not any(word in ended.stderr for word in ("Warning", "warn", "Loading weights")), ended.stderr
    assert len(list((tmp_path / "out" / "results").iterdir())) > 0


@pytest.mark.ray
def test_rows_and_edits_are_those_of_a_worker(settings: dict[str, Any], tmp_path: Path) -> None:
    outcomes = {}
    for name, pipeline in (("here", {}), ("worker", {"actors": 1, "preparers": 1})):
        config = from_dict(
            settings | {"out": str(tmp_path / name), "pipeline": {"batch_size": 2, **pipeline}, "keep_edits": True}
        )
        outcomes[name] = run(config, QUIET).workspace
    found = {
        name: [
            {column: value for column, value in row.items() if column not in NOT_REPRODUCIBLE}
            for row in rows.read_rows(rows.parts(workspace))
        ]
        for name, workspace in outcomes.items()
    }
    assert json.dumps(found["here"], default=str) == json.dumps(found["worker"], default=str)
    for edit in outcomes["here"].edits.glob("*.safetensors"):
        other = outcomes["worker"].edits / edit.name
        # The metadata holds the time of the edit; the tensors are equal to the last bit.
        assert _tensors(edit) == _tensors(other)


def _tensors(file: Any) -> dict[str, bytes]:
    from safetensors.torch import load

    return {name: value.numpy().tobytes() for name, value in load(Path(file).read_bytes()).items()}
