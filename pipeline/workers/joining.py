"""The login to a running Ray cluster, tested in a separate process before Ray's client connects."""

from __future__ import annotations

import os
import subprocess
import sys

from cluster import login
from cluster.packing import JobError
from odedit.errors import InputError
from pipeline.workers import probe

_SETTING = "pipeline.ray_address"
_accepted: dict[str, dict[str, str]] = {}
"""Environment variables of the accepted login, by address of the cluster."""


def login_to(address: str) -> dict[str, str]:
    """The environment variables with which the cluster accepts Ray's client.

    The first call for an address takes a few seconds; its result is cached.

    Raises:
        InputError: The cluster does not answer, or refuses the token.
    """
    if address not in _accepted:
        try:
            _accepted[address] = {login.MODE: _accepted_mode(address)}
        except JobError as error:
            raise InputError(str(error)) from error
    return _accepted[address]


def _accepted_mode(address: str) -> str:
    """The first authentication mode that the cluster accepts."""
    modes = login.modes()
    for mode in modes:
        if mode == login.TOKEN:
            login.token()  # raises JobError if it cannot be read
        code, reason = _ask(address, mode)
        if code == 0:
            return mode
        if code != probe.REFUSED:
            raise InputError(
                f"{_SETTING}: no Ray answers at {address!r} ({reason}). "
                "Give a running cluster, or null to start Ray on this machine."
            )
    raise InputError(f"{_SETTING}: the cluster at {address} {login.refusal(modes[-1])}")


def _ask(address: str, mode: str) -> tuple[int, str]:
    """Runs the probe; returns its exit code and the reason of a failure."""
    # -P: modules beside the script, such as `profile`, would shadow the standard library's.
    command = [sys.executable, "-P", probe.__file__, address]
    environment = os.environ | {login.MODE: mode}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
    return done.returncode, lines[-1]
