"""Scenarios: functions that run a command, cause a fault, and finish the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from odedit.storage.location import copy_folder, locate
from pipeline.tracking.connection import connect
from tests.faults.bench import ALL_DONE, EDITS, PYTHON_PATH, Bench, Ended, wait_until_gone, workers_of
from tests.faults.lossless import Faced, rows_of
from tests.faults.obedient import DIE, GROUP, HOLD, NARROW, REFUSED
from tests.faults.small_disk import small_disk
from tests.support.nodes import LOSSES_SEEN_SOON, two_nodes
from tests.support.object_store import BUCKET, object_store
from tests.support.services import Server

ATTEMPTS = 3
"""Default of `pipeline.max_attempts`."""
ONE_BY_ONE, ALONE = "pipeline.at_once=1", "pipeline.batch_size=1"
_REFUSED_S = 8.0
"""Seconds of refusals, longer than pyarrow's S3 client retries by itself."""
_IN_STORE = f"s3://{BUCKET}"


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        name: The fault, in words.
        answer: The outcome, in words.
        face: Scenario, given the bench and a new folder; also checks the commands' output.
        is_tested_elsewhere: True when other tests cause the same fault.
    """

    name: str
    answer: str
    face: Callable[[Bench, Path], Faced]
    is_tested_elsewhere: bool = False


def worker_killed(bench: Bench, out: Path) -> Faced:
    calm = bench.undisturbed()
    with bench.held(lambda worker: os.kill(worker, signal.SIGKILL)):
        ended = bench.command(out).expect(0, ALL_DONE)
    return Faced(out, ended.seconds, calm)


def node_killed(bench: Bench, out: Path) -> Faced:
    with two_nodes(head_cpus=0, **PYTHON_PATH, **(LOSSES_SEEN_SOON if bench.quick else {})) as cluster:
        on_it = (f"pipeline.ray_address={cluster.gcs}",)
        calm = bench.undisturbed(*on_it, environment=cluster.environment)

        def lose_node(worker: int) -> None:
            process, lost = psutil.Process(worker), cluster.second
            assert cluster.is_on_second(process)
            cluster.add()
            joined, cluster.second = cluster.second, lost
            cluster.lose_second()
            cluster.second = joined
            wait_until_gone([process])

        with bench.held(lose_node):
            ended = bench.command(out, *on_it, environment=cluster.environment)
        ended.expect(0, ALL_DONE, "A node was lost (2 nodes left); what was at work there is done again.")
        assert "(raylet)" not in ended.text, ended.text
    return Faced(out, ended.seconds, calm)


def driver_killed(bench: Bench, out: Path) -> Faced:
    calm, begun = bench.undisturbed(), time.monotonic()
    with bench.ordered(HOLD):
        driver = bench.started(out)
        bench.wait_for_worker()
        left = workers_of(driver.pid)
        assert left
        driver.kill()
        driver.communicate()
    seconds = time.monotonic() - begun
    # A worker may finish its group before it notices that the driver is gone.
    ended = bench.edit(out).expect(0, f"Resuming {out}: ", ALL_DONE)
    wait_until_gone(left)
    return Faced(out, seconds + ended.seconds, calm)


def terminated(bench: Bench, out: Path) -> Faced:
    calm, begun = bench.undisturbed(), time.monotonic()
    with bench.ordered(HOLD):
        driver = bench.started(out)
        bench.wait_for_worker()
        left = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGTERM)
        text, _ = driver.communicate(timeout=60)
    first = Ended(driver.returncode, text, time.monotonic() - begun).expect(130, "the same command goes on from there")
    wait_until_gone(left)
    assert not list((out / "attempts").iterdir()), "an interrupt is no attempt"
    ended = bench.edit(out).expect(0, f"Resuming {out}: {GROUP} of {EDITS}", ALL_DONE)
    return Faced(out, first.seconds + ended.seconds, calm)


def poison(bench: Bench, out: Path) -> Faced:
    calm = bench.undisturbed()
    with bench.ordered(f"{DIE}-edit-04"):
        ended = bench.command(out).expect(0, f"{EDITS - 1} edits, 1 failed, 1 skipped")
    (row,) = [row for row in rows_of(out) if row["edit_id"] == "edit-04"]
    assert f"given up: its worker died in each of {ATTEMPTS} attempts" in row["error"], row["error"]
    return Faced(out, ended.seconds, calm, frozenset(["edit-04"]), {"edit-03": ALONE, "edit-05": ALONE})


def disk_full(bench: Bench, out: Path) -> Faced:
    folder = out.parent / f"{out.name}-disk"
    folder.mkdir()
    calm = bench.undisturbed()
    with small_disk(folder, mebibytes=16) as disk:
        there = disk.path / "out"
        with ExitStack() as space, bench.held(lambda worker: space.enter_context(disk.full(worker))):
            failed = bench.edit(there)
        failed.expect(1, disk.refusal, "The same command goes on from there.")
        ended = bench.edit(there).expect(0, f"Resuming {there}: {GROUP} of {EDITS}", ALL_DONE)
        shutil.copytree(there, out)
    return Faced(out, failed.seconds + ended.seconds, calm)


def mlflow_gone(bench: Bench, out: Path) -> Faced:
    folder = out.parent / f"{out.name}-server"
    folder.mkdir()
    server = Server(f"sqlite:///{folder}/mlflow.db", folder)
    tracked = ("tracking.enabled=true", f"tracking.uri={server.uri}")
    try:
        server.start()
        calm = bench.undisturbed(*tracked)
        with bench.held(lambda worker: server.stop(signal.SIGKILL)):
            failed = bench.edit(out, *tracked)
        failed.expect(1, "could not be written to", f"odedit mlflow sync {out}")
        server.start()
        synced = bench.odedit("mlflow", "sync", out).expect(0, "is logged, as run")
        client = connect(server.uri)
        run = client.get_run(json.loads((out / "run.json").read_text())["run_id"])
        assert run.info.status == "FINISHED" and run.data.metrics["records/edited"] == EDITS
        assert len(client.list_artifacts(run.info.run_id, "edits")) == EDITS
    finally:
        server.stop()
    return Faced(out, failed.seconds + synced.seconds, calm)


def storage_refuses(bench: Bench, out: Path) -> Faced:
    with object_store() as store:
        copy_folder(bench.inputs, locate(_IN_STORE, "inputs"), "records.json")
        inputs = (
            f"data.path={_IN_STORE}/records.json",
            f"data.image_root={_IN_STORE}/coco",
            f"data.rephrase_root={_IN_STORE}/rephrased",
        )

        def stored(name: str) -> tuple[str, ...]:
            return *inputs, f"pipeline.feature_store={_IN_STORE}/features-{name}", f"out={_IN_STORE}/{name}"

        calm = bench.undisturbed(*stored("before"))
        refusing = _Refusing(after=5 * GROUP, seconds=_REFUSED_S)
        store.answer = refusing
        ended = bench.edit(out, *stored("run")).expect(0, ALL_DONE)
        assert refusing.count
        (out / "attempts").mkdir(parents=True)
        for name in store.names("run/"):
            path = out / name.removeprefix("run/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(locate(f"s3://{BUCKET}/{name}", "out").read_bytes())
    return Faced(out, ended.seconds, calm)


class _Refusing:
    """Answers 503 to every request for `seconds`, once `after` pictures have been read."""

    def __init__(self, after: int, seconds: float) -> None:
        self._reads_left, self._seconds, self._until = after, seconds, 0.0
        self._lock = threading.Lock()
        self.count = 0

    def __call__(self, method: str, path: str) -> int | None:
        with self._lock:
            if method == "GET" and path.endswith((".jpg", ".png")):
                self._reads_left -= 1
                if self._reads_left == 0:
                    self._until = time.monotonic() + self._seconds
            is_refused = time.monotonic() < self._until
            self.count += is_refused
        return 503 if is_refused else None


def out_of_memory(bench: Bench, out: Path) -> Faced:
    calm = bench.undisturbed()
    with bench.ordered(f"{NARROW}-edit-04"):
        ended = bench.edit(out).expect(0, ALL_DONE)
        assert (bench.orders / REFUSED).exists()
    # The worker remembers the width that fits, and makes the following groups one edit at a time.
    return Faced(out, ended.seconds, calm, as_with={f"edit-{number:02d}": ONE_BY_ONE for number in range(GROUP, EDITS)})


def results_damaged(bench: Bench, out: Path) -> Faced:
    shutil.copytree(bench.reference(), out)
    calm = bench.undisturbed()
    parts = sorted((out / "results").iterdir())
    content = [part.read_bytes() for part in parts]
    middle = len(content[2]) // 3
    parts[0].write_bytes(content[0][: len(content[0]) // 2])
    parts[1].write_bytes(b"")
    parts[2].write_bytes(content[2][:middle] + bytes(512) + content[2][middle + 512 :])
    again = bench.edit(out).expect(
        0, "Damaged or missing: part-000000.parquet, part-000001.parquet, part-000002.parquet"
    )
    again.expect(0, "3 groups of edits are done again", f"Resuming {out}: {GROUP} of {EDITS}", ALL_DONE)
    return Faced(out, calm + again.seconds, calm)


def others_damaged(bench: Bench, out: Path) -> Faced:
    shutil.copytree(bench.reference(), out)
    calm = bench.undisturbed()
    _cut_off(out / "run.json")
    _cut_off(out / "edits" / "edit-04.safetensors")
    (out / "edits" / "edit-07.safetensors").write_bytes(b"")
    (out / "attempts" / "group-000001.json").write_text('{"whole": 2, "sing')
    again = bench.edit(out).expect(0, "run.json is damaged", "Damaged or missing: edit-04.safetensors, edit-07")
    again.expect(0, "2 groups of edits are done again", f"Resuming {out}: {EDITS - 2 * GROUP} of {EDITS}", ALL_DONE)
    return Faced(out, calm + again.seconds, calm)


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FAULTS = (
    Fault(
        "a worker is killed in the middle of an edit",
        "a new worker starts and repeats its group",
        worker_killed,
        is_tested_elsewhere=True,
    ),
    Fault("a node is killed", "a node that joined takes over and repeats its group", node_killed),
    Fault("the command is killed (SIGKILL)", "the same command resumes; finished groups are kept", driver_killed),
    Fault("the command is ended (SIGTERM, Ctrl-C)", "exit code 130; the same command resumes", terminated),
    Fault(
        "a record kills its worker each time",
        f"a failed row with the reason after {ATTEMPTS} attempts; the rest of its group is edited",
        poison,
        is_tested_elsewhere=True,
    ),
    Fault("the disk is full", "exit code 1 and a message; with free space, the same command resumes", disk_full),
    Fault(
        "the MLflow server stops during the run and returns later",
        "exit code 1; the results are in `out`, and `odedit mlflow sync` logs them",
        mlflow_gone,
    ),
    Fault(
        f"the object storage of records, pictures and results answers 503 for {_REFUSED_S:.0f} s",
        "reads and writes are retried for a minute; then exit code 1, and the same command resumes",
        storage_refuses,
    ),
    Fault("memory runs out", "the number of edits at once is halved, down to one", out_of_memory),
    Fault(
        "result files are damaged",
        "the same command reports them and repeats their groups",
        results_damaged,
    ),
    Fault(
        "edits, `run.json` and the count of attempts are damaged",
        "as above; settings are read from `config.yaml`, attempts counted from 0",
        others_damaged,
    ),
)
