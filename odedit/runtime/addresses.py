"""Paths and addresses as text: children, parents, and addresses without secrets."""

from __future__ import annotations

import os
import re

# `user:password@`, also with an unencoded `@` in the password or, if no port precedes it, `/`.
# Both patterns take linear time on any text, because records are untrusted.
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s:]*:(?!\d*/)\S{0,500})@")
_SECRET_PARAMETER = re.compile(
    r"""(?<=[?&])(?=[^=&?\s]*=)([^=&?\s]*(?:key|secret|token|password|sas|sig|credential)[^=&?\s]*)=[^&\s'"<>]*""",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text without user names, passwords and access keys in its addresses, for display and storage.

    >>> masked("https://me:secret@mlflow.example/api")
    'https://***@mlflow.example/api'
    >>> masked("abfs://records@account/coco?sas_token=secret&region=x")
    'abfs://***@account/coco?sas_token=***&region=x'
    """
    return _SECRET_PARAMETER.sub(r"\1=***", _USER_INFO.sub("***@", text))


def below(text: str, relative: str) -> str:
    """The path or address `relative` below another one; parameters of an address stay at its end.

    >>> below("s3://bucket/runs?region=x", "one"), below("runs/", "one")
    ('s3://bucket/runs/one?region=x', 'runs/one')
    """
    base, mark, query = _split(text)
    return f"{base.removesuffix('/')}/{relative}{mark}{query}"


def above(text: str) -> str:
    """The folder of a path or address.

    >>> above("s3://bucket/runs/one?region=x"), above("/runs/one")
    ('s3://bucket/runs?region=x', '/runs')
    """
    base, mark, query = _split(text)
    folder, slash, _ = base.rstrip("/").rpartition("/")
    is_top = not folder or folder.endswith("/")  # the root of a file system, or a bucket
    return (base if is_top and "://" in base else folder or slash or ".") + mark + query


def _split(text: str) -> tuple[str, str, str]:
    """The text before and after the `?` of an address; in a path, `?` is part of a name."""
    return text.partition("?") if "://" in text else (text, "", "")


def relative_note(path: str) -> str:
    """A sentence for messages about a local path: the folder where relative paths start.

    Empty if the path lies outside the current folder and its parent, as only `x` and `../x` are likely relative.

    >>> relative_note("/far/away")
    ''
    """
    here = os.getcwd()
    folder = os.path.dirname(here)
    if folder == "/":
        folder = here
    is_below = path in (here, folder) or path.startswith(f"{folder.rstrip('/')}/")
    return f" Relative paths start at the current folder, {here!r}." if is_below and "://" not in path else ""


def reason(error: OSError) -> str:
    """The cause of a file system's error, in one line without secrets."""
    return error.strerror or masked(" ".join(str(error).split())[:300]).rstrip(".")


def shareable(checkpoint: str) -> str:
    """A checkpoint's name for files that leave this machine: without secrets, and without the folders of a full path.

    >>> shareable("Salesforce/blip2-opt-2.7b"), shareable("/data/models/blip2/")
    ('Salesforce/blip2-opt-2.7b', 'blip2')
    """
    if "://" not in checkpoint and checkpoint.startswith(("/", "~")):
        return os.path.basename(checkpoint.rstrip("/")) or checkpoint
    return masked(checkpoint)
