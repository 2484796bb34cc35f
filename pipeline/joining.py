"""A Ray cluster that runs already: whether it lets this user in, and whether it has room for the workers of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from odedit.errors import InputError
from pipeline import probe
from pipeline.spec import Plan

SAID_EVERY_S = 10.0
_POLL_S = 1.0
_TOKEN = "Set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file with it."


def login(address: str) -> dict[str, str]:
    """The variables with which Ray's client is let in; asks the cluster, which takes a second or two.

    `RAY_AUTH_MODE` is taken as it is set. Else a token that the environment names is used, and one in
    `~/.ray/auth_token` where the cluster asks for it: that file may be of another cluster.

    Raises:
        InputError: The cluster does not answer, or refuses the token.
    """
    if "://" in address:
        return {}
    named = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), None)
    modes = [os.environ.get("RAY_AUTH_MODE") or ("token" if named else "disabled")]
    default = Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_MODE" not in os.environ and named is None and default.is_file():
        modes.append("token")
    if modes == ["token"] and named != "RAY_AUTH_TOKEN":
        _check_file(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default), named)
    for mode in modes:
        code, why = _ask(address, mode)
        if code == 0:
            return {"RAY_AUTH_MODE": mode}
        if code != probe.REFUSED:
            raise InputError(
                f"pipeline.ray_address: no Ray answers at {address!r} ({why}). "
                "Give a running cluster, or null to start Ray on this machine."
            )
    if modes[-1] == "token":
        raise InputError(
            f"pipeline.ray_address: the cluster at {address} refuses the token in {named or default}. {_TOKEN}"
        )
    raise InputError(f"pipeline.ray_address: the cluster at {address} asks for a token, and none is given. {_TOKEN}")


def _check_file(path: Path, named: str | None) -> None:
    """Raises InputError if the file of the token cannot be read."""
    where = named or "RAY_AUTH_MODE=token"
    try:
        content = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{where}: the token's file {path} cannot be read ({why}). {_TOKEN}") from error
    if not content:
        raise InputError(f"{where}: the token's file {path} is empty. {_TOKEN}")


def _ask(address: str, mode: str) -> tuple[int, str]:
    """The exit code of the probe, and why it failed."""
    # -P: the folder of the script has modules with names of the standard library's.
    command = [sys.executable, "-P", probe.__file__, address]
    environment = os.environ | {"RAY_AUTH_MODE": mode}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
    return done.returncode, lines[-1]


def lacking(plan: Plan) -> str:
    """What the cluster has too little of for one worker of the plan, or "": no single node has room for it."""
    import ray

    for node in ray.nodes():
        found = node["Resources"] if node["Alive"] else {}
        if found.get("CPU", 0.0) >= plan.cpus_per_actor and found.get("GPU", 0.0) >= plan.gpus_per_actor:
            return ""
    gpus = f" and {plan.gpus_per_actor:g} GPU" if plan.gpus_per_actor else ""
    return f"a worker takes {plan.cpus_per_actor:g} CPU{gpus}, and no node of the cluster has as much"


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
        if self.console is not None and (self.said is None or now - self.said >= SAID_EVERY_S):
            self.said = now
            left = self.wait_s - (now - self.since)
            text = f"Waiting for the cluster, for at most {left:.0f} s (pipeline.wait_s): {missing}."
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
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
    """Inside, a cluster that has lost its nodes is waited for; Ray alone would wait for ever and say nothing.

    Raises:
        GraphError: No node could take a worker for `wait_s`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from pipeline.graph import GraphError

    ended, problems = threading.Event(), list[str]()

    def watch() -> None:
        patience = _Patience(wait_s, console)
        while not ended.wait(_POLL_S):
            missing = ""
            with suppress(Exception):  # a head that does not answer is Ray's own concern
                missing = lacking(plan)
            if patience.is_over(missing):
                problems.append(missing)
                # Again and again: code that lets no exception out may have swallowed the first.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: Any = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=watch, name="watch-cluster", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if not problems:
            raise
        raise GraphError(
            f"The cluster has lost what the run needs: {problems[0]}; nothing was added within {wait_s:g} s "
            "(pipeline.wait_s). The same command goes on from there."
        ) from error
    finally:
        ended.set()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        thread.join()
        signal.signal(signal.SIGUSR1, before)
