"""Import directions between rooms, and the libraries that each package may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    ("odedit.errors", "odedit.runtime", "odedit.settings", "cluster"),
    ("odedit.evaluation.columns",),
    ("odedit.plugins", "odedit.inputs", "odedit.storage", "odedit.risks"),
    ("odedit.world", "odedit.data"),
    ("odedit.backbones",),
    ("odedit.editors",),
    ("odedit.objectives", "odedit.evaluation"),
    ("odedit.editing", "odedit.training"),
    ("odedit.ways",),
    ("odedit",),
    ("pipeline.console", "pipeline.interrupts", "pipeline.variables"),
    ("pipeline.config",),
    ("pipeline.run_folder",),
    ("pipeline.tracking",),
    ("pipeline.report", "pipeline.workers"),
    ("pipeline.driver", "pipeline.edits", "pipeline.notebook"),
    ("pipeline.training",),
    ("pipeline.study",),
    ("pipeline.commands", "pipeline.demo", "tune"),
    ("pipeline.score",),
    ("odedit.__main__",),
)
"""Floors from top to bottom. A room may import rooms on the floors above its own, and no other room on its own floor;
`odedit.errors` and `odedit.runtime` may import each other. A file that is named here has a floor of its own."""
SHARED_FLOOR = {"odedit.errors", "odedit.runtime"}
FORBIDDEN = {
    "odedit": {"ray", "mlflow", "optuna", "pipeline", "tune", "cluster"},
    "pipeline": {"tune", "optuna"},
    "tune": {"cluster", "mlflow"},
    "cluster": {"torch", "transformers", "odedit", "pipeline", "tune", "mlflow", "optuna"},
}
"""Packages that a package may not import; `odedit/__main__.py` may, inside functions."""
PLUGINS = ("editors", "backbones", "objectives", "ways")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Dotted names that a file imports, such as `odedit.editors.base.Editor` or `ray`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(name: str) -> str:
    """Room of a module, or of a name in it: `odedit.editors`, `pipeline.commands`, `tune`."""
    parts = name.split(".")
    file = ".".join(parts[:3])
    if any(file in floor for floor in FLOORS):
        return file
    if parts[0] not in ("odedit", "pipeline"):
        return parts[0]
    path = ROOT.joinpath(*parts[:2])
    return ".".join(parts[:2]) if path.is_dir() or path.with_suffix(".py").is_file() else parts[0]


def edges() -> Iterator[tuple[Path, str, str]]:
    """Imports between rooms: importing file, its room, imported room."""
    for package in FORBIDDEN:
        for path in sources(package):
            here = room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
            for there in {room(name) for name in imported(path) if name.split(".")[0] in FORBIDDEN} - {here}:
                yield path.relative_to(ROOT), here, there


def test_every_room_has_a_floor_and_imports_point_up() -> None:
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    for path, here, there in edges():
        assert {here, there} <= floor_of.keys(), f"{path}: {here} or {there} is in no line of FLOORS"
        if {here, there} <= SHARED_FLOOR:
            continue
        assert floor_of[there] < floor_of[here], f"{path} imports {there}, which is not above {here}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_does_not_import_what_only_others_need(package: str) -> None:
    for path in sources(package):
        is_door = path == ROOT / "odedit" / "__main__.py"
        tops = {name.split(".")[0] for name in imported(path, inside_functions=not is_door)}
        assert not tops & FORBIDDEN[package], f"{path.relative_to(ROOT)}: {tops & FORBIDDEN[package]}"


def test_only_tracking_knows_mlflow() -> None:
    users = {
        str(path.relative_to(ROOT).parent)
        for path in sources("pipeline")
        if any(name.split(".")[0] == "mlflow" for name in imported(path))
    }
    assert users == {"pipeline/tracking"}


@pytest.mark.parametrize("folder", PLUGINS)
def test_a_plug_in_imports_no_other(folder: str) -> None:
    """A plug-in may import `base` and sub-packages such as `common` of the three folders, but no other plug-in."""
    files = [path for path in sources(f"odedit/{folder}") if path.parent.name == folder and path.stem != "__init__"]
    for path in files:
        siblings = [f"odedit.{folder}.{file.stem}." for file in files if file.stem not in ("base", path.stem)]
        others = [f"odedit.{other}." for other in PLUGINS if other != folder]
        for name in imported(path):
            is_shared = any(name.startswith((f"{other}base.", f"{other}common.")) for other in others)
            module = f"{name}."
            assert is_shared or not module.startswith((*siblings, *others)), f"{path.name} imports {name}"


def test_importing_the_core_loads_nothing_heavy_but_torch() -> None:
    heavy = ("ray", "mlflow", "optuna", "transformers", "pandas", "matplotlib")
    code = f"import odedit, sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
