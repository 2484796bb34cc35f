"""The nodes of a cluster: a run waits for them, and reports a lost one in one line without Ray's own output."""

from __future__ import annotations

import io
import signal
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.worker import print_to_stdstream
from rich.console import Console

from odedit.errors import InputError
from pipeline.config.run import BackboneConfig, PipelineConfig, from_dict
from pipeline.workers import nodes
from pipeline.workers.plan import Plan, lacking, make_plan, shortage
from pipeline.workers.stages import GraphError

PLAN = Plan("cpu", 2, 4, 0.0, 1)
GONE = "^The cluster has lost what the run needs: a worker takes 3 CPU, and no node of the cluster has as much; nothing"


def cluster(*alive: str, cpus: float = 4.0) -> list[dict[str, Any]]:
    names = ("head", "one", "two", "three")
    return [{"NodeID": name, "Alive": name in alive, "Resources": {"CPU": cpus}} for name in names]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_lost_node_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], console: Console
) -> None:
    # The head fails to answer once; a node that joins is not reported.
    looks = iter([cluster("head", "one", "two"), None, cluster("head", "one", "three"), cluster("head")])
    seen_all = threading.Event()

    def look() -> list[dict[str, Any]]:
        try:
            listed = next(looks)
        except StopIteration:
            seen_all.set()
            return cluster("head")
        if listed is None:
            raise ConnectionError("the head is away")
        return listed

    monkeypatch.setattr(ray, "nodes", look)
    monkeypatch.setattr(nodes, "_POLL_S", 0.001)

    def report(text: str) -> None:
        print_to_stdstream({"lines": [text], "pid": "raylet", "is_err": False}, ignore_prefix=False)

    with nodes.silenced(), nodes.watched(PLAN, 60, console):
        report("Raylet is terminated.\n [state-dump] of a node")
        assert seen_all.wait(30)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "A node was lost (3 nodes left); what was at work there is done again.",
        "2 nodes were lost (1 node left); what was at work there is done again.",
    ]
    assert capsys.readouterr().out == ""
    assert "odedit-nodes" not in {thread.name for thread in threading.enumerate()}
    report("Something else")  # another text, since Ray does not print one twice
    assert "Something else" in capsys.readouterr().out, "after the block Ray prints its logs again"


def test_missing_resources_are_counted() -> None:
    gpus = make_plan(PipelineConfig(device="cuda", actors=2), BackboneConfig(), 8, 1.0, 10)
    assert shortage(gpus, 8, 1) == "2 actors of 1 GPU each were asked for, the cluster has 1"
    assert shortage(gpus, 8, 2) == ""
    assert shortage(PLAN, 4, 0).endswith("need 7 cores, the cluster has 4")
    assert lacking(PLAN, cluster("one")) == "" and lacking(PLAN, cluster()) and lacking(PLAN, cluster("one", cpus=2.0))
    with pytest.raises(InputError, match="wait_s: got -1"):
        from_dict({"pipeline": {"wait_s": -1}})


def test_a_run_waits_for_nodes(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    monkeypatch.setattr(nodes, "_POLL_S", 0.01)
    monkeypatch.setattr(nodes, "_requested", lambda plan: nullcontext())
    missing = ["two GPUs", "a GPU", ""]
    assert nodes.awaited(lambda: (PLAN, missing.pop(0)), 60, console) is PLAN
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said == "Waiting for the cluster, for at most 60 s (pipeline.wait_s): two GPUs.\n"
    with pytest.raises(InputError, match=r"^pipeline.actors: two GPUs; nothing was added within 0.05 s \(pipeline.w"):
        nodes.awaited(lambda: (PLAN, "two GPUs"), 0.05, None)


def test_a_cluster_that_loses_its_nodes_ends_the_run_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_POLL_S", 0.01)
    states = [cluster("one"), cluster(), cluster("one"), *[cluster()] * 1000]
    monkeypatch.setattr(ray, "nodes", lambda: states.pop(0))
    with pytest.raises(GraphError, match=GONE + " was added within 0.1 s"), nodes.watched(PLAN, 0.1, None):
        time.sleep(30)
    monkeypatch.setattr(ray, "nodes", lambda: cluster("one"))
    with nodes.watched(PLAN, 0.0, None):
        time.sleep(0.1)
    with pytest.raises(KeyError), nodes.watched(PLAN, 0.0, None):
        raise KeyError


def test_a_second_signal_at_the_end_of_the_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(threading.Event):
        """An event that receives the watcher's next signal when it is first set."""

        is_late = False

        def set(self) -> None:
            if not self.is_late:
                self.is_late = True
                signal.raise_signal(signal.SIGUSR1)
            super().set()

    monkeypatch.setattr(ray, "nodes", lambda: cluster())
    monkeypatch.setattr(nodes, "threading", SimpleNamespace(**vars(threading) | {"Event": Late}))
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(GraphError, match=GONE), nodes.watched(PLAN, 0.0, None):
        time.sleep(30)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert "odedit-nodes" not in {thread.name for thread in threading.enumerate()}
