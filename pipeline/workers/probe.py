"""A test of the connection to a Ray cluster: `python probe.py ADDRESS` exits with 0 if the cluster accepts the login.

In a process of its own, since Ray's client reads its login once per process, retries for 40 seconds, and exits the
process if it finds no token.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

REFUSED = 3
"""Exit code if the cluster asks for a token, or for another one."""
_TIMEOUT_S = 6.0
_CLIENT = "ray://"
"""Scheme of a Ray Client server's address."""


def main(address: str) -> int:
    """Tests the connection; returns the exit code and prints the reason of a failure."""
    try:
        if address != "auto":
            _connect(address.removeprefix(_CLIENT))  # before the slow import of Ray
        from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]

        if address == "auto":
            from ray._private.services import canonicalize_bootstrap_address_or_die

            address = canonicalize_bootstrap_address_or_die(address)
            _connect(address)
        if os.environ["RAY_AUTH_MODE"] == "token" and not AuthenticationTokenLoader.instance().has_token():
            return REFUSED
        if address.startswith(_CLIENT):
            _ping(address.removeprefix(_CLIENT))
        else:
            threading.Timer(_TIMEOUT_S, _give_up).start()
            GcsClient(address=address).internal_kv_keys(b"", namespace=b"session", timeout=_TIMEOUT_S)
    except Exception as error:
        if type(error).__name__ == "AuthenticationError" or "StatusCode.UNAUTHENTICATED" in str(error):
            return REFUSED
        print(" ".join(str(error).split())[:300] or type(error).__name__)
        return 1
    return 0


def _connect(address: str) -> None:
    """Raises OSError if nothing listens at the address, ValueError if it is malformed."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ValueError("expected HOST:PORT, or auto")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()


def _ping(address: str) -> None:
    """Raises a gRPC error unless a Ray Client server accepts the login."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import ray_client_pb2 as messages
    from ray.core.generated import ray_client_pb2_grpc as services

    server = services.RayletDriverStub(init_grpc_channel(address))
    server.ClusterInfo(messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING), timeout=_TIMEOUT_S)


def _give_up() -> None:
    print(f"no answer within {_TIMEOUT_S:g} s", flush=True)
    os._exit(1)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)
