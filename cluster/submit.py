"""`odedit submit`: runs a command of odedit as a job of a Ray cluster. Needs neither torch nor transformers."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from cluster import login, packing, sealing
from cluster.packing import JobError

LOST = 1
"""Exit code for a job without one: it was stopped, or did not start."""
_POLL_S = 1.0
_READY_S = 60.0
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
"""Variables that keep Ray's own messages out of the job's log."""


def submit(
    arguments: Sequence[str],
    address: str,
    console: Console,
    *,
    wait: bool = True,
    environment: Sequence[str] = (),
    include: Sequence[Path] = (),
    install: bool = False,
    code: str | None = None,
) -> int:
    """Submits a command to a cluster. Returns the job's exit code, or 0 without `wait`.

    Args:
        arguments: Command (`edit`, `tune`, `study` or `train`) and its arguments.
        address: Address of the cluster's dashboard.
        wait: Show the job's log until it ends.
        environment: Names of environment variables to pass to the job.
        include: Further files and folders below the current folder to send.
        install: Install the project's dependencies for the job with pip.
        code: Version of the code, recorded in the job's results.

    Raises:
        JobError: The command would not work on the cluster, or the cluster does not answer.
    """
    missing = [name for name in environment if name not in os.environ]
    if missing:
        raise JobError(f"--env: {', '.join(missing)} not set here. Set it, or omit the option.")
    with tempfile.TemporaryDirectory(prefix="odedit-job-") as temporary:
        parcel = packing.pack(arguments, Path(temporary), Path.cwd(), include, code)
        runtime: dict[str, Any] = {"working_dir": temporary, "env_vars": dict(_QUIET)}
        if install:
            runtime["pip"] = packing.requirements()
        client = _client(address)
        if environment:
            _pass_variables({name: os.environ[name] for name in environment}, runtime, parcel.notes)
        for note in parcel.notes:
            _say(console, f"Note: {note}")
        _say(console, f"Sending {parcel.num_bytes / 2**20:.1f} MiB to {address} ...")
        job = _submit_job(client, address, shlex.join(["python", "-m", "odedit", *parcel.arguments]), runtime)
    _say(console, f"Job {job}. {_advice(job)}")
    return follow(job, address, console) if wait else 0


def _pass_variables(values: dict[str, str], runtime: dict[str, Any], notes: list[str]) -> None:
    """Adds variables to the job's runtime environment, encrypted unless the cluster has no token."""
    if os.environ[login.MODE] == login.DISABLED:
        runtime["env_vars"] |= values
        notes.append("The cluster has no token, so Ray's dashboard and logs show the variables of --env.")
    else:
        runtime["env_vars"][sealing.SEALED] = sealing.seal(values, login.token().text)
        runtime["worker_process_setup_hook"] = sealing.HOOK


def _submit_job(client: Any, address: str, command: str, runtime: dict[str, Any]) -> str:
    """Submits a job and returns its id. Waits up to `_READY_S` for a cluster that has just been started."""
    begun = time.monotonic()
    while True:
        try:
            return str(client.submit_job(entrypoint=command, runtime_env=runtime))
        except _ray_errors() as error:
            if "No available agent" not in str(error) or time.monotonic() - begun > _READY_S:
                raise _explained(address, error) from error
        time.sleep(_POLL_S)


def follow(job: str, address: str, console: Console) -> int:
    """Shows the log of a job until it ends. Returns the job's exit code.

    Reconnects after a lost connection and continues the log where it stopped.

    Raises:
        JobError: The cluster does not answer, or has no such job.
        KeyboardInterrupt: Ctrl-C; the job continues.
    """
    client, shown, failures = _client(address), 0, 0
    _details(client, job, address)
    try:
        while True:
            shown = _run(_tail(client, job, shown))
            try:
                details, failures = client.get_job_info(job), 0
            except _ray_errors() as error:
                failures += 1
                if failures > 30:
                    raise _explained(address, error) from error
                time.sleep(_POLL_S)
                continue
            if details.status.is_terminal():
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        _say(console, f"Job {job} goes on. {_advice(job)}")
        raise
    _run(_tail(client, job, shown))
    return _outcome(job, details, console)


def _advice(job: str) -> str:
    return f"Follow it with: odedit submit --follow {job}; end it with: odedit submit --stop {job}"


def stop(job: str, address: str, console: Console) -> int:
    """Stops a job as Ctrl-C would, and waits for its end. Returns 0, or 1 if it had ended before.

    Raises:
        JobError: The cluster does not answer, or has no such job.
    """
    client = _client(address)
    details = _details(client, job, address)
    if details.status.is_terminal():
        _say(console, f"Job {job} had ended already ({details.status}).")
        return LOST
    client.stop_job(job)
    while not (details := _details(client, job, address)).status.is_terminal():
        time.sleep(_POLL_S)
    _say(console, f"Job {job}: {details.status}. What was finished is kept; the same command goes on from there.")
    return 0


def _run(tail: Coroutine[Any, Any, int]) -> int:
    """`asyncio.run` with KeyboardInterrupt on Ctrl-C; its own cancellation can look like a closed connection."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return asyncio.run(tail)
    finally:
        signal.signal(signal.SIGINT, before)


async def _tail(client: Any, job: str, shown: int) -> int:
    """Prints a job's log from character `shown` on, until the connection ends. Returns the characters shown so far."""
    seen = 0
    try:
        async for text in client.tail_job_logs(job):
            new = text[max(0, shown - seen) :]
            seen += len(text)
            print(new, end="", flush=True)
    except (RuntimeError, OSError):
        pass  # lost connection: `follow` calls again
    return max(seen, shown)


def _outcome(job: str, details: Any, console: Console) -> int:
    status, code = str(details.status), details.driver_exit_code
    _say(console, f"Job {job}: {status}" + (f", exit code {code}." if code is not None else "."))
    if status == "SUCCEEDED":
        return 0
    if code is None or code == 0:
        if details.message and status == "FAILED":
            _say(console, str(details.message).strip())
        return LOST
    # Negative: ended by a signal.
    return int(code) if code > 0 else 128 - int(code)


def _client(address: str) -> Any:
    """A connected client; `RAY_AUTH_MODE` is set to the mode that the cluster accepted.

    The mode is always set: unset, Ray 2.60 sends no token but jobs expect one, and Ray 2.61 always sends one.
    """
    modes = login.modes()
    for mode in modes:
        if mode == login.TOKEN:
            login.token()  # raises a clear error for a missing token
        os.environ[login.MODE] = mode
        login.read_again()
        try:
            return _connect(address)
        except _ray_errors() as error:
            if mode == modes[-1] or not _is_refusal(error):
                raise _explained(address, error) from error
    raise AssertionError("a login has at least one mode")


def _connect(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("ray.dashboard", "ray._private.runtime_env")):
            logging.getLogger(name).setLevel(logging.ERROR)
    return JobSubmissionClient(address)


def _ray_errors() -> tuple[type[Exception], ...]:
    """Exceptions of Ray's client for a cluster that does not exist, does not answer, or refuses."""
    from ray.exceptions import RayError

    return RayError, RuntimeError, OSError, ValueError


def _details(client: Any, job: str, address: str) -> Any:
    try:
        return client.get_job_info(job)
    except _ray_errors() as error:
        if "does not exist" in str(error) or "404" in str(error):
            raise JobError(f"The cluster at {address} has no job {job!r}.") from error
        raise _explained(address, error) from error


def _is_refusal(error: BaseException) -> bool:
    """True when the cluster refused the login."""
    return any(mark in str(error) for mark in ("uthentication", "nauthorized", "Forbidden", "AUTH_TOKEN"))


def _explained(address: str, error: BaseException) -> JobError:
    if _is_refusal(error):
        return JobError(f"--address: the cluster at {address} {login.refusal(os.environ[login.MODE])}")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    return JobError(f"--address: no cluster takes jobs at {address} ({reason}). Give the address of its dashboard.")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
