"""Nodes of a Ray cluster: waiting for the resources of a run, and reports of lost nodes."""

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

_MESSAGE_EVERY_S = 10.0
_POLL_S = 1.0


@contextmanager
def silenced() -> Iterator[None]:
    """Inside, Ray's driver does not print the logs of the cluster's nodes.

    Even with `log_to_driver=False` it prints the end of a lost node's log (a state dump) several times, some of it only
    at shutdown.
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
    """A time limit on how long resources may be missing, with progress messages.

    Attributes:
        wait_s: The limit in seconds.
        console: Console for the messages.
        since: Time at which resources became missing; None: none is missing.
        last_message: Time of the last message; None: none since then.
    """

    wait_s: float
    console: Console | None
    since: float | None = None
    last_message: float | None = None

    def is_over(self, missing: str) -> bool:
        """Whether resources have been missing for `wait_s`; `missing` names them, or is "" if there are none."""
        now = time.monotonic()
        if not missing:
            self.since = self.last_message = None
            return False
        self.since = now if self.since is None else self.since
        if now - self.since >= self.wait_s:
            return True
        if self.last_message is None or now - self.last_message >= _MESSAGE_EVERY_S:
            self.last_message = now
            left = self.wait_s - (now - self.since)
            if self.console is not None:
                say(self.console, f"Waiting for the cluster, for at most {left:.0f} s (pipeline.wait_s): {missing}.")
        return False


def awaited(look: Callable[[], tuple[Plan, str]], wait_s: float, console: Console | None) -> Plan:
    """Waits until the cluster has the resources of the plan; returns the plan.

    Args:
        look: Returns the plan for the cluster's present size, and the resources that it lacks, in words, or "".
        wait_s: Seconds to wait at most.
        console: Console for progress messages.

    Raises:
        InputError: The resources were still missing after `wait_s`.
    """
    patience = _Patience(wait_s, console)
    with ExitStack() as stack:
        is_requested = False
        while True:
            plan, missing = look()
            if not missing:
                return plan
            if patience.is_over(missing):
                raise InputError(
                    f"pipeline.actors: {missing}; nothing was added within {wait_s:g} s (pipeline.wait_s). Ask for "
                    "fewer or smaller workers (pipeline.actors, gpus_per_actor, threads_per_actor), or add nodes."
                )
            if not is_requested:
                stack.enter_context(_requested(plan))
                is_requested = True
            time.sleep(min(_POLL_S, wait_s))


@contextmanager
def _requested(plan: Plan) -> Iterator[None]:
    """Inside, a placement group requests the workers' resources, without which an autoscaler would start no node."""
    from ray.util import placement_group, remove_placement_group

    bundle = {"CPU": plan.cpus_per_actor} | ({"GPU": plan.gpus_per_actor} if plan.gpus_per_actor else {})
    group = placement_group([bundle] * plan.num_actors)
    try:
        yield
    finally:
        remove_placement_group(group)


@contextmanager
def watched(plan: Plan, wait_s: float, console: Console | None) -> Iterator[None]:
    """Inside, each lost node is reported in one line. Ends the block if no node can hold a worker for `wait_s`.

    Ray itself has no such timeout, and prints nothing.

    Args:
        plan: Plan whose workers need the nodes.
        wait_s: Seconds after which the block is ended.
        console: Console for the lines, which are written from another thread.

    Raises:
        GraphError: No node could hold a worker for `wait_s`.
    """
    from pipeline.workers.stages import GraphError

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
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
            ended.set()  # a signal that arrives before this call returns is handled below
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
    """Polls the nodes in a thread until `ended` is set.

    Attributes:
        plan: Plan whose workers need the nodes.
        patience: Time limit on missing resources.
        ended: Set when the watched block ends.
        problems: Filled with the missing resources when the time limit is reached.
    """

    plan: Plan
    patience: _Patience
    ended: threading.Event
    problems: list[str]

    def run(self) -> None:
        known: set[str] = set()
        while not self.ended.is_set():
            if (listed := _nodes()) is not None:
                alive = {node["NodeID"] for node in listed if node["Alive"]}
                self._report(len(known - alive), len(alive))
                known = alive
                if self.patience.is_over(missing := lacking(self.plan, listed)):
                    self.problems.append(missing)
                    # Repeated at every poll: a destructor may have swallowed the exception of the first signal.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            self.ended.wait(_POLL_S)

    def _report(self, num_lost: int, num_left: int) -> None:
        if num_lost:
            which = "A node was" if num_lost == 1 else f"{num_lost} nodes were"
            left = counted(num_left, "node")
            if self.patience.console is not None:
                say(self.patience.console, f"{which} lost ({left} left); what was at work there is done again.")


def _nodes() -> Sequence[Mapping[str, Any]] | None:
    """The nodes as listed by Ray; None while the head does not answer."""
    import ray

    try:
        return ray.nodes()
    except Exception:
        return None
