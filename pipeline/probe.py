"""A question to a Ray cluster, in a process of its own: `python probe.py ADDRESS` ends with 0 if the cluster answers.

Ray's client reads its login once, tries for 40 seconds, and ends its process where it finds no token.
"""

from __future__ import annotations

import os
import socket
import sys

REFUSED = 3
"""Exit code where the cluster asks for another token."""
_TIMEOUT_S = 3


def main(address: str) -> int:
    from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        if address == "auto":
            from ray._private.services import canonicalize_bootstrap_address_or_die

            address = canonicalize_bootstrap_address_or_die(address)
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()
        if os.environ["RAY_AUTH_MODE"] == "token" and not AuthenticationTokenLoader.instance().has_token():
            return REFUSED
        GcsClient(address=address).internal_kv_keys(b"", namespace=b"session", timeout=_TIMEOUT_S)
    except AuthenticationError:
        return REFUSED
    except Exception as error:
        print(" ".join(str(error).split())[:300] or type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
