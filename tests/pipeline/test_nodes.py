"""A node that a cluster loses: one line, and nothing of what Ray's driver would print."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import ray
from ray._private.worker import print_to_stdstream

from pipeline import nodes


def test_a_lost_node_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def cluster(*alive: str) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": name in alive} for name in ("head", "one", "two", "three")]

    # The head does not answer once; a node that joins is no news.
    looks = iter([cluster("head", "one", "two"), None, cluster("head", "one", "three"), cluster("head")])
    seen_all = threading.Event()
    said: list[str] = []

    def look() -> list[dict[str, Any]]:
        found = next(looks, cluster("head"))
        if found is None:
            raise ConnectionError("the head is away")
        return found

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            seen_all.set()

    monkeypatch.setattr(ray, "nodes", look)
    monkeypatch.setattr(nodes, "_SECONDS_BETWEEN_LOOKS", 0.001)

    def report(text: str) -> None:
        print_to_stdstream({"lines": [text], "pid": "raylet", "is_err": False}, ignore_prefix=False)

    with nodes.silenced(), nodes.watched("10.0.0.1:6379", say):
        report("Raylet is terminated.\n [state-dump] of a node")
        assert seen_all.wait(30)
    assert said == [
        "A node was lost (3 nodes left); what was at work there is done again.",
        "2 nodes were lost (1 node left); what was at work there is done again.",
    ]
    assert capsys.readouterr().out == ""
    assert "odedit-nodes" not in {thread.name for thread in threading.enumerate()}
    report("Something else")  # Ray itself leaves out what is repeated
    assert "Something else" in capsys.readouterr().out, "and a program that uses Ray afterwards gets its reports"


def test_a_ray_of_ones_own_is_not_watched() -> None:
    before = threading.active_count()
    with nodes.watched(None, lambda text: pytest.fail(text)):
        assert threading.active_count() == before
