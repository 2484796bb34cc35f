"""Readers of the files in `cluster/` that start a cluster."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import yaml
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

FOLDER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
}
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file() and path.suffix not in (".py", ".md"))
LAUNCHED = ("onprem.yaml", "aws.yaml")
KUBERAY = ("raycluster.yaml", "rayjob.yaml")
CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "PGPASSWORD",
)
NO_METRICS = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}
"""Variables that close Ray's metrics ports, which demand no token."""
MAKE_TOKEN = "(umask 077; ray get-auth-token --generate > /dev/null); chmod 600 ~/.ray/auth_token"


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


def cluster_of(name: str) -> dict[str, Any]:
    """RayClusterSpec of a file for KubeRay."""
    spec = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict[str, Any]]:
    """Pod templates of a file's nodes."""
    spec = cluster_of(name)
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def all_pods(name: str) -> list[dict[str, Any]]:
    """Pod templates of a file's nodes and of the pod that submits its run."""
    submitter = load(name)["spec"].get("submitterPodTemplate")
    return pods(name) + ([submitter] if submitter else [])


def page() -> str:
    """The page that documents the files."""
    return text("README.md")


def slurm(option: str) -> str:
    (value,) = re.findall(rf"^#SBATCH --{option}=(\S+)$", text("slurm.sh"), flags=re.MULTILINE)
    return value


def commands(name: str) -> list[str]:
    """Commands that a file shows or runs: indented in comments, between backticks, and in its own settings."""
    content = text(name)
    lines = [line.split("   ")[0].strip() for line in re.findall(r"^# {5}(\S.*)$", content, flags=re.MULTILINE)]
    for comment in re.findall(r"#.*(?:\n *#.*)*", content):
        lines += re.findall(r"`([^`]+)`", re.sub(r"\n *# ?", " ", comment))
    lines += re.findall(r"entrypoint: (.*)", content)
    lines += [" ".join(json.loads(line)) for line in re.findall(r"^CMD (.*)$", content, flags=re.MULTILINE)]
    return lines
