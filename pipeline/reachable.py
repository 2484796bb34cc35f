"""Whether servers that a run names can be reached: told in seconds, where their libraries would try for minutes."""

from __future__ import annotations

import socket
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from odedit.addresses import masked
from odedit.errors import InputError
from pipeline.config import PipelineConfig

_PATIENCE_S = 5.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_server(uri: str, setting: str) -> None:
    """Raises InputError unless something listens at the address, where the address says at which port.

    Behind a proxy nothing is tried: only the proxy knows.
    """
    address = _split(uri, setting)
    scheme = address.scheme.partition("+")[0]
    is_behind_proxy = scheme in getproxies() and not proxy_bypass(address.hostname or "")
    port = address.port or _PORTS.get(scheme)
    if address.hostname and port and not is_behind_proxy:
        _connect(address.hostname, port, setting, f"no server answers at {masked(uri)!r}", "")


def check_ray(pipeline: PipelineConfig) -> None:
    """Raises InputError unless something listens at the address of a Ray cluster; `auto` is left to Ray."""
    address, setting = pipeline.ray_address, "pipeline.ray_address"
    if address is None or address in ("auto", "local"):
        return
    found = _split(address if "://" in address else f"//{address}", setting)
    if found.scheme not in ("", "ray") or not found.hostname or not found.port:
        raise InputError(
            f"{setting}: got {address!r}, expected host:port of a cluster's head, such as 10.0.0.1:6379, "
            "ray://host:port or auto; null starts Ray on this machine."
        )
    hint = " Give a running cluster, or null to start Ray on this machine."
    _connect(found.hostname, found.port, setting, f"no Ray answers at {address!r}", hint)


def _split(text: str, setting: str) -> SplitResult:
    try:
        address = urlsplit(text)
        _ = address.port
    except ValueError as error:
        raise InputError(f"{setting}: {masked(text)!r} is no address ({error}).") from None
    return address


def _connect(host: str, port: int, setting: str, problem: str, hint: str) -> None:
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{setting}: {problem} ({host}, port {port}: {reason}).{hint}") from error
