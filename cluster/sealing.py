"""Encryption of a job's environment variables with the cluster's token.

Ray shows the variables of a job in its dashboard, in the logs of every node and on the command lines of workers. The
key is derived from the cluster's token, which only processes of the cluster have, and they can run any code there
anyway. If the token leaks later, it decrypts the variables in old logs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Mapping

from cluster import login
from cluster.packing import JobError

SEALED = "ODEDIT_SEALED_VARIABLES"
"""Environment variable that holds the encrypted variables."""
HOOK = "cluster.sealing.unseal"
"""Function that Ray calls when a worker of the job starts."""
_SALT_BYTES = 16


def seal(values: Mapping[str, str], token: str) -> str:
    """The variables as encrypted text, with a random salt.

    Raises:
        JobError: The token is empty, so that anyone could decrypt the text.
    """
    if not token.strip():
        raise JobError("--env: the cluster's token is empty, so it cannot encrypt the variables. Set RAY_AUTH_TOKEN.")
    from cryptography.fernet import Fernet

    salt = secrets.token_bytes(_SALT_BYTES)
    secret = Fernet(_key(token, salt)).encrypt(json.dumps(dict(values)).encode())
    return f"{salt.hex()}:{secret.decode()}"


def unseal() -> None:
    """Decrypts the variables of `SEALED`, if it is set, into the environment.

    Raises:
        JobError: This process has no token, or another one than the variables were encrypted with.
    """
    text = os.environ.get(SEALED)
    if not text:
        return
    from cryptography.fernet import Fernet, InvalidToken

    salt, _, secret = text.partition(":")
    try:
        values = Fernet(_key(login.token().text, bytes.fromhex(salt))).decrypt(secret.encode())
    except (InvalidToken, JobError) as error:
        raise JobError(
            "--env: the variables cannot be decrypted where the job runs: its nodes have no token, or another than the "
            "one that the job was submitted with. Submit with the nodes' own token (RAY_AUTH_TOKEN), or with "
            "RAY_AUTH_MODE=disabled if they have none; or set the variables on the nodes."
        ) from error
    os.environ.update(json.loads(values))


def _key(token: str, salt: bytes) -> bytes:
    return base64.urlsafe_b64encode(hashlib.scrypt(token.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32))
