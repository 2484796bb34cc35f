"""Variables on their way to a job, encrypted with the cluster's token.

Ray shows the variables of a job in its dashboard, in the logs of every node and on the command lines of workers. Only
processes of the cluster have its token, and they can run code there anyway, so the token is the key. A token that
becomes known later decrypts what old logs hold.
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
"""Variable that holds the encrypted ones."""
HOOK = "cluster.sealing.unseal"
"""Function that Ray calls at the start of each of the job's workers."""
_SALT_BYTES = 16


def seal(values: Mapping[str, str], token: str) -> str:
    """The variables as text that only a holder of the token can read.

    Raises:
        JobError: The token is empty, so anyone could read the text.
    """
    if not token.strip():
        raise JobError("--env: the cluster's token is empty, so it cannot encrypt the variables. Set RAY_AUTH_TOKEN.")
    from cryptography.fernet import Fernet

    salt = secrets.token_bytes(_SALT_BYTES)
    secret = Fernet(_key(token, salt)).encrypt(json.dumps(dict(values)).encode())
    return f"{salt.hex()}:{secret.decode()}"


def unseal() -> None:
    """Sets the variables that this process was handed encrypted, if there are any.

    Raises:
        JobError: This process has no token, or another than the one that they were encrypted with.
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
