"""Which code made a result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def code_version() -> str:
    """Package version, and the commit where the package runs from a git working tree; `+changes` if that was edited."""
    try:
        version = importlib.metadata.version("odedit")
    except importlib.metadata.PackageNotFoundError:
        version = "source"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return version
    return (
        f"{version} ({commit}{'+changes' if _git(root, 'status', '--porcelain', '--', 'odedit', 'pipeline') else ''})"
    )


def software() -> dict[str, str]:
    """Versions that results may depend on."""
    names = ("torch", "transformers", "ray", "mlflow")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
