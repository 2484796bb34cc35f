"""The nodes of a Ray cluster: a run waits for the room it needs, and says which nodes are lost while it works."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rich.console import Console

from odedit.errors import InputError, counted
from pipeline.console import say
from pipeline.workers.plan import Plan, lacking

SAID_EVERY_S = 10.0
_POLL_S = 1.0


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


@dataclass
class _Patience:
    """How long something has been missing, what of it was said, and whether the time is up."""

    wait_s: float
    console: Console | None
    since: float | None = None
    said: float | None = None

    def is_over(self, missing: str) -> bool:
        now = time.monotonic()
        if not missing:
            self.since = self.said = None
            return False
        self.since = now if self.since is None else self.since
        if now - self.since >= self.wait_s:
            return True
        if self.said is None or now - self.said >= SAID_EVERY_S:
            self.said = now
            left = self.wait_s - (now - self.since)
            if self.console is not None:
                say(self.console, f"Waiting for the cluster, for at most {left:.0f} s (pipeline.wait_s): {missing}.")
        return False


def awaited(look: Callable[[], tuple[Plan, str]], wait_s: float, console: Console | None) -> Plan:
    """The plan, once the cluster has room for it.

    Args:
        look: The plan as the cluster is now, and what is missing for it, or "".

    Raises:
        InputError: It was still missing after `wait_s`.
    """
    patience = _Patience(wait_s, console)
    with ExitStack() as stack:
        is_asked_for = False
        while True:
            plan, missing = look()
            if not missing:
                return plan
            if patience.is_over(missing):
                raise InputError(
                    f"pipeline.actors: {missing}; nothing was added within {wait_s:g} s (pipeline.wait_s). Ask for "
                    "fewer or smaller workers (pipeline.actors, gpus_per_actor, threads_per_actor), or add nodes."
                )
            if not is_asked_for:
                stack.enter_context(_asked_for(plan))
                is_asked_for = True
            time.sleep(min(_POLL_S, wait_s))


@contextmanager
def _asked_for(plan: Plan) -> Iterator[None]:
    """Inside, an autoscaler sees what the workers will take; it would not start a node for a driver that only waits."""
    from ray.util import placement_group, remove_placement_group

    bundle = {"CPU": plan.cpus_per_actor} | ({"GPU": plan.gpus_per_actor} if plan.gpus_per_actor else {})
    group = placement_group([bundle] * plan.num_actors)
    try:
        yield
    finally:
        remove_placement_group(group)


@contextmanager
def watched(plan: Plan, wait_s: float, console: Console | None) -> Iterator[None]:
    """Inside, each lost node is reported in one line, and the block ends if no node has room for a worker for too long.

    Ray has no time-out of its own for that, and prints nothing.

    Args:
        wait_s: Seconds after which the block ends.
        console: Takes the lines, from another thread.

    Raises:
        GraphError: No node could take a worker for `wait_s`.
    """
    from pipeline.workers.graph import GraphError

    if threading.current_thread() is not threading.main_thread():  # only there can a signal end the block
        yield
        return
    ended, problems = threading.Event(), list[str]()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not ended.is_set():
            raise KeyboardInterrupt

    before: Any = signal.signal(signal.SIGUSR1, interrupt)
    watcher = _Watcher(plan, _Patience(wait_s, console), ended, problems)
    thread = threading.Thread(target=watcher.run, name="odedit-nodes", daemon=True)
    try:
        try:
            thread.start()
            yield
        finally:
            ended.set()  # a signal that comes before this call ends is still met below
    except BaseException as error:
        if not problems:
            raise
        raise GraphError(
            f"The cluster has lost what the run needs: {problems[0]}; nothing was added within {wait_s:g} s "
            "(pipeline.wait_s). The same command goes on from there."
        ) from error
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@dataclass
class _Watcher:
    """A thread that looks at the nodes until `ended`.

    Attributes:
        problems: What is missing, each time that the patience is over.
    """

    plan: Plan
    patience: _Patience
    ended: threading.Event
    problems: list[str]

    def run(self) -> None:
        known: set[str] = set()
        while not self.ended.is_set():
            if (found := _nodes()) is not None:
                alive = {node["NodeID"] for node in found if node["Alive"]}
                self._report(len(known - alive), len(alive))
                known = alive
                if self.patience.is_over(missing := lacking(self.plan, found)):
                    self.problems.append(missing)
                    # Again and again: code that lets no exception out may have swallowed the first.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            self.ended.wait(_POLL_S)

    def _report(self, num_lost: int, num_left: int) -> None:
        if num_lost:
            which = "A node was" if num_lost == 1 else f"{num_lost} nodes were"
            left = counted(num_left, "node")
            if self.patience.console is not None:
                say(self.patience.console, f"{which} lost ({left} left); what was at work there is done again.")


def _nodes() -> Sequence[Mapping[str, Any]] | None:
    """The nodes as Ray lists them, or None while the head does not answer."""
    import ray

    try:
        return ray.nodes()
    except Exception:
        return None
