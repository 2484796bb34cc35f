"""A check within seconds that a server can be reached; client libraries would retry for minutes."""

from __future__ import annotations

import socket
from urllib.parse import SplitResult, parse_qs, urlsplit
from urllib.request import getproxies, proxy_bypass

from odedit.errors import InputError
from odedit.runtime.addresses import masked

_PATIENCE_S = 5.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_ELSEWHERE = {"unix_socket", "host", "odbc_connect"}
"""Parameters of a database's address that override its host and port."""


def check_server(uri: str, setting: str) -> None:
    """Raises InputError unless a server listens at the address.

    An address without a known port, behind a proxy, or with a socket or host in its query is not checked.

    Args:
        setting: Name of the setting with the address, for the message.
    """
    address = _split(uri, setting)
    if not _ELSEWHERE.isdisjoint(parse_qs(address.query)):
        return
    scheme = address.scheme.partition("+")[0]
    is_behind_proxy = scheme in getproxies() and not proxy_bypass(address.hostname or "")
    port = address.port or _PORTS.get(scheme)
    if not address.hostname or not port or is_behind_proxy:
        return
    try:
        socket.create_connection((address.hostname, port), timeout=_PATIENCE_S).close()
    except OSError as error:
        why = f"{address.hostname}, port {port}: {error.strerror or error}"
        raise InputError(f"{setting}: no server answers at {masked(uri)!r} ({why}).") from error


def _split(text: str, setting: str) -> SplitResult:
    try:
        address = urlsplit(text)
        _ = address.port
    except ValueError as error:
        raise InputError(f"{setting}: {masked(text)!r} is not an address ({error}).") from None
    return address
