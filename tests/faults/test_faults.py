"""A run survives every fault with one row per record, and with the rows and edits of the undisturbed run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.bench import ROOT, Bench
from tests.faults.lossless import check
from tests.faults.scenarios import FAULTS, Fault

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), quick=True)


# Tested elsewhere: tests/cluster/test_two_nodes.py kills a worker, tests/pipeline/workers/test_graph.py has a record
# that does.
@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if not fault.is_tested_elsewhere], ids=lambda fault: fault.face.__name__
)
def test_a_run_survives(fault: Fault, bench: Bench, tmp_path: Path) -> None:
    check(bench, fault.face(bench, tmp_path / "out"))


def test_the_page_of_the_pipeline_has_the_table() -> None:
    """The table of `make faults`: every fault, and no record lost."""
    text = (ROOT / "pipeline" / "README.md").read_text(encoding="utf-8")
    for fault in FAULTS:
        assert re.search(rf"^\| {re.escape(f'{fault.name} | {fault.answer}')} \| -?\d+ s \| 0 \|$", text, re.MULTILINE)
