"""Variables on their way to a job, encrypted with the cluster's token.

Ray shows the variables of a job in its dashboard, in the logs of every node and on the command lines of workers. Only
processes of the cluster have its token, and they can run code there anyway, so the token is the key.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Mapping

from cluster.packing import JobError

SEALED = "ODEDIT_SEALED_VARIABLES"
"""Variable that holds the encrypted ones."""
HOOK = "cluster.sealing.unseal"
"""Function that Ray calls at the start of each of the job's workers."""
_SALT_BYTES = 16


def seal(values: Mapping[str, str], token: str) -> str:
    """The variables as text that only a holder of the token can read."""
    from cryptography.fernet import Fernet

    salt = secrets.token_bytes(_SALT_BYTES)
    secret = Fernet(_key(token, salt)).encrypt(json.dumps(dict(values)).encode())
    return f"{salt.hex()}:{secret.decode()}"


def unseal() -> None:
    """Sets the variables that this process was handed encrypted, if there are any.

    Raises:
        JobError: This process has another token than the one that they were encrypted with.
    """
    text = os.environ.get(SEALED)
    if not text:
        return
    from cryptography.fernet import Fernet, InvalidToken

    salt, _, secret = text.partition(":")
    try:
        values = Fernet(_key(token(), bytes.fromhex(salt))).decrypt(secret.encode())
    except InvalidToken as error:
        raise JobError(
            "--env: the variables cannot be decrypted where the job runs: its nodes have another token than the one "
            "that the job was submitted with. Submit with the nodes' own token (RAY_AUTH_TOKEN), or set the variables "
            "on the nodes."
        ) from error
    os.environ.update(json.loads(values))


def token() -> str:
    """The cluster's token as Ray finds it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token); "" for none."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    loader = AuthenticationTokenLoader.instance()
    return str(loader.get_raw_token()) if loader.has_token() else ""


def _key(token: str, salt: bytes) -> bytes:
    return base64.urlsafe_b64encode(hashlib.scrypt(token.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32))
