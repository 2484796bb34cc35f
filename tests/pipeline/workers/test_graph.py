"""The graph on a real local Ray, started once: neither the number of workers nor a dying one changes the results.

Starting a worker takes seconds, so the other side of each comparison runs in this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from odedit.errors import InputError
from odedit.runtime.stages import stage
from pipeline.config.run import from_dict
from pipeline.driver.progress import Progress
from pipeline.driver.run import run
from pipeline.run_folder import rows as results
from pipeline.workers import graph, ray_session
from pipeline.workers.plan import Plan, make_plan
from pipeline.workers.profile import WAITING, Clock, Profile
from tests.support import inline_pipeline
from tests.support.mmedit_files import record, write_array
from tests.support.rows import assert_same

pytestmark = pytest.mark.ray

QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with ray_session.shared():
        yield


def rows_of(
    settings: dict[str, Any], name: str, profile: Profile | None = None, **pipeline: Any
) -> list[dict[str, Any]]:
    changed = settings | {"out": f"{settings['out']}-{name}", "pipeline": settings["pipeline"] | pipeline}
    outcome = run(from_dict(changed), QUIET, profile=profile)
    return list(results.read_rows(results.parts(outcome.workspace)))


def test_two_actors_edit_at_once_and_give_the_rows_that_one_gives(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "processes"
    folder.mkdir()

    def signing(processes: int) -> dict[str, Any]:
        editor = {"name": "outside_editors.signing", "sites": ["layers.2.ffn.in"], "max_steps": 2}
        return settings | {
            "editor": editor | {"folder": str(folder), "processes": processes},
            "objective": {"own_weight": 1.0},
        }

    with monkeypatch.context() as patch:
        inline_pipeline.install(patch)
        inline = rows_of(signing(1), "one")
    assert [row["status"] for row in inline] == ["edited"] * 5
    (signature,) = list(folder.iterdir())
    signature.unlink()
    # Three groups in two blocks, as in a large run.
    monkeypatch.setattr(graph, "MAX_BLOCKS", 2)
    monkeypatch.setattr(graph, "MAX_BLOCKS_PER_ACTOR", 1)
    profile = Profile()
    spread = rows_of(signing(2), "two", profile, actors=2, preparers=1)
    assert_same(spread, inline)
    assert len(list(folder.iterdir())) == 2
    stored = json.loads(Path(f"{settings['out']}-two", "profile.json").read_text())
    assert stored == {"records": 5, "seconds": profile.seconds}
    assert {"start: model, measurements", "image features", "edit: forward", "evaluation", "write results"} <= set(
        stored["seconds"]["edit"]
    )
    assert stored["seconds"]["prepare"]["records and pictures"] > 0
    listening = {
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.parametrize(("batch_size", "group"), [(4, 0), (1, 1)], ids=["in a group", "in a block of groups"])
def test_an_edit_that_kills_its_worker_is_a_failed_row(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, batch_size: int, group: int
) -> None:
    for name in ("MAX_BLOCKS", "MAX_BLOCKS_PER_ACTOR"):
        monkeypatch.setattr(graph, name, 1)
    records = [record(number, edit_id=edit_id) for number, edit_id in enumerate(["good-1", "exit-1", "good-2"])]
    write_array(Path(settings["data"]["path"]), records)
    editor = {"name": "outside_editors.poisoned", "sites": ["layers.2.ffn.in"], "max_steps": 1}
    deadly = settings | {"editor": editor, "objective": {"name": "native"}}
    # As if the group had killed one worker already, since every further death costs the start of a worker.
    attempts = Path(f"{settings['out']}-deadly") / "attempts" / f"group-{group:06d}.json"
    attempts.parent.mkdir(parents=True)
    attempts.write_text('{"whole": 1, "single": {}}')
    rows = rows_of(deadly, "deadly", actors=1, preparers=1, batch_size=batch_size, max_attempts=2)
    assert [row["status"] for row in rows] == ["edited", "failed", "edited"]
    assert "given up" in rows[1]["error"]


@pytest.mark.parametrize(
    ("settings_of_plan", "machine", "expected"),
    [
        ({}, (2, 0, 100), Plan("cpu", 2, 1, 0.0, 1)),
        ({}, (2, 0, 6), Plan("cpu", 1, 1, 0.0, 1)),
        ({}, (16, 4, 100), Plan("cuda", 4, 1, 1.0, 8)),
        ({"gpus_per_actor": 0.5}, (16, 1, 100), Plan("cuda", 2, 1, 0.5, 8)),
        ({"device": "cpu", "actors": 3, "preparers": 2}, (4, 1, 100), Plan("cpu", 3, 1, 0.0, 2)),
    ],
)
def test_the_plan_fills_the_machine(settings_of_plan: dict, machine: tuple[int, int, int], expected: Plan) -> None:
    config = from_dict({"pipeline": settings_of_plan})
    assert make_plan(config.pipeline, config.backbone, *machine) == expected


def test_a_model_over_several_gpus_takes_them_all_for_each_actor() -> None:
    config = from_dict({"backbone": {"gpus": 2}})
    assert make_plan(config.pipeline, config.backbone, 16, 5, 100) == Plan("cuda", 2, 1, 2.0, 8)
    with pytest.raises(InputError, match=r"backbone\.gpus: got 2, but there are 1;"):
        make_plan(config.pipeline, config.backbone, 16, 1, 100)
    with pytest.raises(InputError, match=r"backbone\.gpus: got 2, but there are 0;"):
        make_plan(config.pipeline, config.backbone, 16, 0, 100)
    on_cpu = from_dict({"backbone": {"gpus": 2}, "pipeline": {"device": "cpu"}})
    with pytest.raises(InputError, match=r"backbone\.gpus: got 2, but pipeline\.device is 'cpu'"):
        make_plan(on_cpu.pipeline, on_cpu.backbone, 16, 4, 100)


def test_stages_of_a_call_add_up_to_it_and_waiting_stands_apart() -> None:
    clock, profile = Clock(), Profile()
    for _ in range(2):
        begun = time.perf_counter()
        with clock.call() as account, stage("outer"):
            time.sleep(0.01)
            with stage("inner"):
                time.sleep(0.02)
        elapsed = time.perf_counter() - begun
        work = {name: seconds for name, seconds in account.seconds.items() if name != WAITING}
        assert set(work) == {"outer", "inner"} and work["inner"] >= 0.02 and work["outer"] >= 0.01
        assert sum(work.values()) == pytest.approx(elapsed, abs=5e-3)
        profile.add({"edit": account.seconds}, 4)
        time.sleep(0.01)
    assert account.seconds[WAITING] >= 0.01
    assert profile.records == 8 and profile.seconds["edit"]["inner"] >= 0.04
    table = profile.table()
    assert table.row_count == 3
    assert list(table.columns[1].cells) == ["inner", "outer", WAITING], "the longest first, waiting last"


def test_progress_counts_records_and_averages_those_that_worked() -> None:
    progress = Progress(QUIET, total=6)
    row = {"status": "edited", "rel": 1.0, "t_gen": 0.5, "m_gen": 0.0, "t_loc": 1.0, "m_loc": 1.0}
    progress.include([{"status": "skipped"}, row])
    assert progress.line().startswith("2/6 records (1 skipped)  rel 1.000"), "no speed yet"
    assert not progress.line().endswith("records/s")
    progress.observe([row, row | {"rel": 0.0}, {"status": "failed"}, {"status": "skipped"}])
    line = progress.line()
    assert line.startswith("6/6 records (1 failed, 2 skipped)  rel 0.667  t_gen 0.500")
    assert line.endswith("records/s")
