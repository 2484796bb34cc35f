"""`cluster/slurm.sh` with a simulated Slurm that runs every step on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.cluster_files import FOLDER, ROOT

SCRIPT = FOLDER / "slurm.sh"
SRUN = """#!/usr/bin/env bash
echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN $*" >> "$STEPS"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $* == "show hostnames node[1-2]" ]] && printf '%s\\n' $NODES
"""
RAY = """#!/usr/bin/env bash
[[ $* == *--address* && -n ${FAILING:-} ]] && exit 1
stat -c %a "/tmp/ray-$SLURM_JOB_ID" >> "$MODES"
trap 'exit 0' TERM
while true; do sleep 0.1; done
"""
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m odedit"*) trap 'echo ended >> "$CALLED"; exit 3' TERM
    echo "$RAY_ADDRESS ${{*:3}}" > "$CALLED"
    for _ in {{1..300}}; do [[ -n ${{ENDLESS:-}} ]] && sleep 0.1; done
    exit 7 ;;
  "- "*) cat > /dev/null; echo asked >> "$ASKED"
    asked=$(wc -l < "$ASKED") started=$(cat "$MODES" 2> /dev/null | wc -l)
    echo $((asked < started ? asked : started)) ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


class Allocation:
    """Simulated allocation: two nodes, the second joining late; if `real`, one node with this machine's Ray."""

    def __init__(self, folder: Path, *, real: bool = False) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, content in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "python": PYTHON}.items():
            if not (real and name in ("ray", "python")):
                (self.bin / name).write_text(content)
                (self.bin / name).chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.job = str(10_000 + free.getsockname()[1])
        self.port = 20_000 + int(self.job) % 10_000
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))
        } | {
            "PATH": os.pathsep.join([str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "NODES": "node1" if real else "node1 node2",
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "2",
            "ODEDIT_HEAD_IP": "127.0.0.1",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray stays on the loopback address
            **{name.upper(): str(folder / name) for name in ("steps", "called", "asked", "modes")},
        }

    @property
    def scratch(self) -> Path:
        """Ray's working folder on a node during the job."""
        return Path(f"/tmp/ray-{self.job}")

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *arguments],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def left(self) -> list[str]:
        """Command lines of processes of the job that still run."""
        lines = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if f"ray-{self.job}" in line or str(self.bin) in line:
                lines.append(line)
        return lines


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


def test_without_a_command_nothing_is_started(allocation: Allocation) -> None:
    ended = allocation.run()
    assert ended.returncode == 2 and "Say what to run" in ended.stderr
    assert not (allocation.folder / "steps").exists()


def test_the_command_runs_once_all_nodes_have_joined_and_its_exit_code_counts(allocation: Allocation) -> None:
    ended = allocation.run("edit", "--config", "my run.yaml")
    assert ended.returncode == 7, ended.stderr
    assert allocation.read("asked").count("asked") >= 2  # the second node joins late
    assert allocation.read("called") == f"127.0.0.1:{allocation.port} edit --config my run.yaml\n"
    assert allocation.left() == []

    steps = dict(re.findall(r"--nodelist=(\S+) (.*)", allocation.read("steps")))
    assert set(steps) == {"node1", "node2"}
    assert "--cpus-per-task=2 bash -c " in steps["node1"] and " --block --num-cpus=2 " in steps["node1"]
    assert f"--head --node-ip-address=127.0.0.1 --port={allocation.port} --include-dashboard=false" in steps["node1"]
    assert f"--address=127.0.0.1:{allocation.port}" in steps["node2"]


def test_every_step_has_the_token_which_is_another_for_each_job_and_on_no_command_line(allocation: Allocation) -> None:
    tokens = set()
    for _ in range(2):
        allocation.run("edit")
    for line in allocation.read("steps").splitlines():
        mode, token, command = line.split(" ", 2)
        assert mode == "token" and re.fullmatch("[0-9a-f]{64}", token) and token not in command
        tokens.add(token)
    assert len(tokens) == 2


def test_what_ray_writes_on_a_node_is_the_users_alone_and_goes_with_the_job(allocation: Allocation) -> None:
    allocation.run("edit")
    assert allocation.read("modes").split() == ["700", "700"]
    *_, last = allocation.read("steps").splitlines()
    assert last.endswith(f"--nodes=2 --ntasks=2 rm -rf -- {allocation.scratch}")
    assert not allocation.scratch.exists()


def test_a_folder_that_another_user_has_put_in_its_place_is_not_used(allocation: Allocation) -> None:
    elsewhere = allocation.folder / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    allocation.scratch.symlink_to(elsewhere)
    ended = allocation.run("edit")
    assert ended.returncode == 1 and "the others ended" in ended.stderr
    assert elsewhere.stat().st_mode & 0o777 == 0o755 and not list(elsewhere.iterdir())
    assert not (allocation.folder / "modes").exists() and not allocation.scratch.is_symlink()


def test_a_node_that_does_not_join_ends_the_job(allocation: Allocation) -> None:
    (allocation.bin / "python").write_text(PYTHON.replace("echo $((asked < started ? asked : started))", "echo 1"))
    ended = allocation.run("edit", FAILING="yes")
    assert ended.returncode == 1 and "1 of 2 nodes have joined" in ended.stderr
    assert not (allocation.folder / "called").exists() and allocation.left() == []


def test_the_end_of_the_time_is_handed_on_and_the_run_may_finish_what_it_does(allocation: Allocation) -> None:
    script = subprocess.Popen(
        [SCRIPT, "edit"], env=allocation.environment | {"ENDLESS": "yes"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (allocation.folder / "called").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # the script sets its trap just after it starts the run
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=60) == 3
    assert allocation.read("called").endswith("ended\n") and allocation.left() == []


@pytest.mark.ray
def test_a_real_ray_is_started_used_and_ended(tmp_path: Path) -> None:
    allocation = Allocation(tmp_path, real=True)
    try:
        (tmp_path / "run.yaml").write_text("editor: {name: wize}\n")
        ended = allocation.run("edit", "--config", str(tmp_path / "run.yaml"))
        assert ended.returncode == 2, ended.stderr
        assert "Ray: 1 of 1 nodes have joined." in ended.stderr and "Did you mean 'wise'?" in ended.stderr
        assert allocation.left() == [] and not allocation.scratch.exists()
    finally:
        shutil.rmtree(allocation.scratch, ignore_errors=True)
