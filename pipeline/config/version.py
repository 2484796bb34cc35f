"""Versions of the code and of its libraries, stored with every result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

SENT = "VERSION"
"""File beside this one with the version of code sent to a cluster, where git and package metadata are missing."""
_PACKAGES = ("odedit", "pipeline", "tune", "cluster")


def code_version() -> str:
    """Package version, followed in a git working tree by the commit, and by `+changes` if files differ from it."""
    sent = Path(__file__).with_name(SENT)
    if sent.is_file():
        return sent.read_text(encoding="utf-8").strip()
    try:
        version = importlib.metadata.version("odedit")
    except importlib.metadata.PackageNotFoundError:
        version = "source"
    revision = commit()
    if not revision:
        return version
    changes = "+changes" if _git(_root(), "status", "--porcelain", "--", *_PACKAGES) else ""
    return f"{version} ({revision[:12]}{changes})"


def commit() -> str:
    """Commit of the code in a git working tree; empty elsewhere."""
    return _git(_root(), "rev-parse", "HEAD") if (_root() / ".git").exists() else ""


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def software() -> dict[str, str]:
    """Versions of Python and of the libraries that results may depend on."""
    names = ("torch", "transformers", "ray", "mlflow")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **versions}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
