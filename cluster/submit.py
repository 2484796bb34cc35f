"""`odedit submit`: a command of odedit as a job of a Ray cluster. Needs neither torch nor transformers."""

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
"""Exit code of a job that has none of its own: it was stopped, or could not be started."""
_POLL_S = 1.0
_READY_S = 60.0
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
"""What of Ray's own messages would stand between the job's."""


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
    """Sends a command to a cluster; the job's exit code, or 0 if it is not waited for.

    Args:
        arguments: `edit`, `tune`, `study` or `train` and what follows.
        address: Of the cluster's dashboard.
        environment: Names of variables that the job gets as they are here.
        include: Files and folders below the current one to take along as well.
        install: Let pip install the project's dependencies for the job, instead of finding them on the cluster.
        code: Version of the code that is sent, which the job's results record.

    Raises:
        JobError: The command would not work there, or no cluster answers.
    """
    missing = [name for name in environment if name not in os.environ]
    if missing:
        raise JobError(f"--env: {', '.join(missing)} not set here. Set it, or leave it out.")
    with tempfile.TemporaryDirectory(prefix="odedit-job-") as temporary:
        parcel = packing.pack(arguments, Path(temporary), Path.cwd(), include, code)
        runtime: dict[str, Any] = {"working_dir": temporary, "env_vars": dict(_QUIET)}
        if install:
            runtime["pip"] = packing.requirements()
        client = _client(address)
        if environment:
            _hand_on({name: os.environ[name] for name in environment}, runtime, parcel.notes)
        for note in parcel.notes:
            _say(console, f"Note: {note}")
        _say(console, f"Sending {parcel.num_bytes / 2**20:.1f} MiB to {address} ...")
        job = _sent(client, address, shlex.join(["python", "-m", "odedit", *parcel.arguments]), runtime)
    _say(console, f"Job {job}. {_handles(job)}")
    return follow(job, address, console) if wait else 0


def _hand_on(values: dict[str, str], runtime: dict[str, Any], notes: list[str]) -> None:
    """Adds the user's variables to what the job gets, encrypted unless the cluster works without token."""
    if os.environ[login.MODE] == login.DISABLED:
        runtime["env_vars"] |= values
        notes.append("The cluster has no token, so what --env hands on can be read in Ray's dashboard and logs.")
    else:
        runtime["env_vars"][sealing.SEALED] = sealing.seal(values, login.token().text)
        runtime["worker_process_setup_hook"] = sealing.HOOK


def _sent(client: Any, address: str, command: str, runtime: dict[str, Any]) -> str:
    """The job's id. A cluster that has just been started is given a minute to be ready for jobs."""
    begun = time.monotonic()
    while True:
        try:
            return str(client.submit_job(entrypoint=command, runtime_env=runtime))
        except _troubles() as error:
            if "No available agent" not in str(error) or time.monotonic() - begun > _READY_S:
                raise _explained(address, error) from error
        time.sleep(_POLL_S)


def follow(job: str, address: str, console: Console) -> int:
    """Shows the log of a job until it ends; its exit code.

    A connection that breaks is made anew, and the log goes on where it was.

    Raises:
        JobError: No cluster answers, or it knows no such job.
        KeyboardInterrupt: The user has seen enough; the job goes on.
    """
    client, shown, failures = _client(address), 0, 0
    _details(client, job, address)
    try:
        while True:
            shown = _run(_tail(client, job, shown))
            try:
                details, failures = client.get_job_info(job), 0
            except _troubles() as error:
                failures += 1
                if failures > 30:
                    raise _explained(address, error) from error
                time.sleep(_POLL_S)
                continue
            if details.status.is_terminal():
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        _say(console, f"Job {job} goes on. {_handles(job)}")
        raise
    _run(_tail(client, job, shown))
    return _outcome(job, details, console)


def _handles(job: str) -> str:
    return f"Follow it with: odedit submit --follow {job}; end it with: odedit submit --stop {job}"


def stop(job: str, address: str, console: Console) -> int:
    """Ends a job as Ctrl-C would, and waits until it has ended; 0 if it had not ended before.

    Raises:
        JobError: No cluster answers, or it knows no such job.
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
    """As `asyncio.run`, whose own Ctrl-C only cancels: a library may take that for the end of its connection."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return asyncio.run(tail)
    finally:
        signal.signal(signal.SIGINT, before)


async def _tail(client: Any, job: str, shown: int) -> int:
    """Prints what a job has written since, as long as the connection holds; how much has been shown now."""
    seen = 0
    try:
        async for text in client.tail_job_logs(job):
            new = text[max(0, shown - seen) :]
            seen += len(text)
            print(new, end="", flush=True)
    except (RuntimeError, OSError):
        pass  # asked for again
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
    # A process that a signal ended has a negative one.
    return int(code) if code > 0 else 128 - int(code)


def _client(address: str) -> Any:
    """A client that the cluster has accepted, in the mode that `RAY_AUTH_MODE` holds from then on.

    The mode is never left unset: with Ray 2.60 that means no token here but one there, and from 2.61 always a token.
    """
    modes = login.modes()
    for mode in modes:
        if mode == login.TOKEN:
            login.token()  # says what is wrong with it, before the cluster is asked
        os.environ[login.MODE] = mode
        login.read_again()
        try:
            return _connected(address)
        except _troubles() as error:
            if mode == modes[-1] or not _is_refusal(error):
                raise _explained(address, error) from error
    raise AssertionError("a login has at least one mode")


def _connected(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("ray.dashboard", "ray._private.runtime_env")):
            logging.getLogger(name).setLevel(logging.ERROR)
    return JobSubmissionClient(address)


def _troubles() -> tuple[type[Exception], ...]:
    """What Ray's client raises if a cluster is not there, does not answer, or refuses."""
    from ray.exceptions import RayError

    return RayError, RuntimeError, OSError, ValueError


def _details(client: Any, job: str, address: str) -> Any:
    try:
        return client.get_job_info(job)
    except _troubles() as error:
        if "does not exist" in str(error) or "404" in str(error):
            raise JobError(f"The cluster at {address} knows no job {job!r}.") from error
        raise _explained(address, error) from error


def _is_refusal(error: BaseException) -> bool:
    """Whether the cluster has refused the login."""
    return any(sign in str(error) for sign in ("uthentication", "nauthorized", "Forbidden", "AUTH_TOKEN"))


def _explained(address: str, error: BaseException) -> JobError:
    if _is_refusal(error):
        return JobError(f"--address: the cluster at {address} {login.refusal(os.environ[login.MODE])}")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    return JobError(f"--address: no cluster takes jobs at {address} ({reason}). Give the address of its dashboard.")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
