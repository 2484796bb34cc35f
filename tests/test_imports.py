"""Imports point one way, and the core stays free of what only the pipeline needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "odedit": {"ray", "mlflow", "optuna", "pipeline", "tune", "cluster"},
    "pipeline": {"tune", "optuna"},
    "tune": {"cluster", "mlflow"},
    "cluster": {"torch", "transformers", "odedit", "pipeline", "tune", "mlflow", "optuna"},
}
"""`odedit/__main__.py` may import the other packages, inside its commands; MLflow belongs to one file."""


def imported(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Top-level names of the packages that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    nodes = list(ast.walk(tree)) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    for path in sources(package):
        is_door = path.name == "__main__.py"
        wrong = imported(path, inside_functions=not is_door) & FORBIDDEN[package]
        if package == "cluster" and is_door:
            continue
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_only_tracking_knows_mlflow() -> None:
    users = [path.name for path in sources("pipeline") if "mlflow" in imported(path)]
    assert users == ["tracking.py"]


PLUGINS = ("editors", "backbones", "objectives")


@pytest.mark.parametrize("folder", PLUGINS)
def test_a_plug_in_imports_no_other(folder: str) -> None:
    """Of its own folder `base` and what is in sub-packages, of the others' `base` alone."""
    files = [path for path in sources(f"odedit/{folder}") if path.parent.name == folder and path.stem != "__init__"]
    for path in files:
        siblings = [f"odedit.{folder}.{one.stem}." for one in files if one.stem not in ("base", path.stem)]
        others = [f"odedit.{other}." for other in PLUGINS if other != folder]
        modules = {
            f"{node.module}.{alias.name}."
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for module in modules:
            is_base = any(module.startswith(f"{other}base.") for other in others)
            assert is_base or not module.startswith((*siblings, *others)), f"{path.name} imports {module}"


def test_importing_the_core_loads_nothing_heavy_but_torch() -> None:
    heavy = ("ray", "mlflow", "optuna", "transformers", "pandas", "matplotlib")
    code = f"import odedit, sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
