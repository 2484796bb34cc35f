"""Nodes that a cluster loses while it works for this process: one line each, instead of Ray's own reports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from odedit.errors import counted

_SECONDS_BETWEEN_LOOKS = 1.0


@contextmanager
def silenced() -> Iterator[None]:
    """Inside, Ray's driver prints none of the reports of the cluster's nodes.

    It prints them whatever `log_to_driver` says, and some as late as it is shut down: of a lost node several times the
    end of its log, which is a dump of its state.
    """
    from ray._private import worker

    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextmanager
def watched(address: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, a node that is lost is reported in one line.

    Args:
        address: Address of the cluster; None: Ray of this process alone, which has one node.
        say: Takes the line; called in another thread.
    """
    if address is None:
        yield
        return
    end = threading.Event()
    thread = threading.Thread(target=_watch, args=(end, say), name="odedit-nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _watch(end: threading.Event, say: Callable[[str], None]) -> None:
    known: set[str] = set()
    while True:
        alive = _alive()
        if alive is not None:
            if lost := len(known - alive):
                which = "A node was" if lost == 1 else f"{lost} nodes were"
                say(f"{which} lost ({counted(len(alive), 'node')} left); what was at work there is done again.")
            known = alive
        if end.wait(_SECONDS_BETWEEN_LOOKS):
            return


def _alive() -> set[str] | None:
    """Ids of the nodes, or None while the head does not answer."""
    import ray

    try:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    except Exception:
        return None
