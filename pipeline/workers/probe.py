"""A question to a Ray cluster, in a process of its own: `python probe.py ADDRESS` ends with 0 if the cluster answers.

Ray's client reads its login once, tries for 40 seconds, and ends its process where it finds no token.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

REFUSED = 3
"""Exit code where the cluster asks for another token."""
_TIMEOUT_S = 6.0
_CLIENT = "ray://"
"""Scheme of the address of a Ray Client server."""


def main(address: str) -> int:
    try:
        if address != "auto":
            _connect(address.removeprefix(_CLIENT))  # before Ray is imported, which may take a while
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
    """Raises OSError or ValueError if nothing listens there."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ValueError("expected HOST:PORT, or auto")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()


def _ping(address: str) -> None:
    """Raises the error of gRPC unless a Ray Client server accepts the login."""
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
