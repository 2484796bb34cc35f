"""The login to a Ray cluster that runs already, tried in a process of its own before Ray's client connects."""

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
"""Variables of the login, by the address that has accepted it."""


def login_to(address: str) -> dict[str, str]:
    """The variables with which the cluster accepts Ray's client.

    The first call for an address asks the cluster, which takes a few seconds.

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
    modes = login.modes()
    for mode in modes:
        if mode == login.TOKEN:
            login.token()  # says what is wrong with it, before the cluster is asked
        code, why = _ask(address, mode)
        if code == 0:
            return mode
        if code != probe.REFUSED:
            raise InputError(
                f"{_SETTING}: no Ray answers at {address!r} ({why}). "
                "Give a running cluster, or null to start Ray on this machine."
            )
    raise InputError(f"{_SETTING}: the cluster at {address} {login.refusal(modes[-1])}")


def _ask(address: str, mode: str) -> tuple[int, str]:
    """The exit code of the probe, and why it failed."""
    # -P: the folder of the script has modules with names of the standard library's.
    command = [sys.executable, "-P", probe.__file__, address]
    environment = os.environ | {login.MODE: mode}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
    return done.returncode, lines[-1]
