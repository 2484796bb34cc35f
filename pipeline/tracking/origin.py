"""Where a run comes from, in MLflow's own tags: command, commit, user and data set."""

from __future__ import annotations

import getpass
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from odedit.runtime.addresses import masked
from pipeline.config.version import commit

_FILE = "file"
_SOURCE_TYPES = {_FILE: "local", "https": "http"}
"""MLflow's names of sources that differ from the scheme of their addresses; `s3` and `gs` do not."""


def tags(command: str) -> dict[str, str]:
    """Tags of a run.

    Args:
        command: Command of odedit that makes it, such as `edit`.
    """
    found = {"mlflow.source.name": f"odedit {command}", "mlflow.source.type": "LOCAL"}
    if revision := commit():
        found["mlflow.source.git.commit"] = revision
    with suppress(OSError, KeyError, ImportError):  # a container's user without a name
        found["mlflow.user"] = getpass.getuser()
    return found


def dataset(path: str, digest: str, counts: Mapping[str, int]) -> Any:
    """MLflow's record of the file of records.

    Args:
        path: Path or address of the file.
        digest: Digest of the records.
        counts: Counts of its records.
    """
    from mlflow.entities import Dataset

    shown = masked(path)
    scheme = shown.partition("://")[0].lower() if "://" in shown else _FILE
    source_type = _SOURCE_TYPES.get(scheme, scheme)
    return Dataset(
        name=name(path),
        digest=digest[:36],
        source_type=source_type,
        source=json.dumps({"url" if source_type == "http" else "uri": shown}),
        profile=json.dumps(counts),
    )


def name(path: str) -> str:
    """Name of a data set: that of its file."""
    return PurePath(masked(path).partition("?")[0]).name[:490]
