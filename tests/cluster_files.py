"""The files of `cluster/` that start a cluster, as tests read them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py")
LAUNCHED = ("onprem.yaml", "aws.yaml")
KUBERAY = ("raycluster.yaml", "rayjob.yaml")
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


def cluster_of(name: str) -> dict[str, Any]:
    """The RayClusterSpec of a file for KubeRay."""
    spec = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict[str, Any]]:
    spec = cluster_of(name)
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def slurm(option: str) -> str:
    (value,) = re.findall(rf"^#SBATCH --{option}=(\S+)$", text("slurm.sh"), flags=re.MULTILINE)
    return value


def commands(name: str) -> list[str]:
    """The commands that a file shows or runs: indented in comments, between backticks, and in its own settings."""
    content = text(name)
    found = [line.split("   ")[0].strip() for line in re.findall(r"^# {5}(\S.*)$", content, flags=re.MULTILINE)]
    for comment in re.findall(r"#.*(?:\n *#.*)*", content):
        found += re.findall(r"`([^`]+)`", re.sub(r"\n *# ?", " ", comment))
    found += re.findall(r"entrypoint: (.*)", content)
    found += [" ".join(json.loads(line)) for line in re.findall(r"^CMD (.*)$", content, flags=re.MULTILINE)]
    return found
