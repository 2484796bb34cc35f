"""A run's own Ray, with its token, or without one if the user disabled authentication."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from odedit.errors import InputError
from pipeline.workers import ray_session

pytestmark = pytest.mark.ray

# Without Ray's own client, which would retry.
STRANGER = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=b"session", timeout=10))
"""
OWNER = """
import os, pathlib, subprocess, sys
from pipeline.config.run import BackboneConfig, PipelineConfig
from pipeline.workers.ray_session import connected
with connected(PipelineConfig(actors=1, preparers=1), BackboneConfig(), 1):
    import ray
    address = ray.get_runtime_context().gcs_address
    print("mode", os.environ["RAY_AUTH_MODE"], ray.get(ray.remote(lambda: 1).remote()), address)
    session = ray._private.worker._global_node.get_session_dir_path()
    closed = [path for path in pathlib.Path(session).parents if path.stat().st_mode & 0o077 == 0]
    print("session", bool(closed), os.path.exists(session))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for token in sys.argv[2:]:
        stranger = [sys.executable, "-c", sys.argv[1], address]
        login = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(stranger, env=kept | login, capture_output=True, text=True, timeout=120)
        print("stranger", done.returncode, done.stdout.strip(), (done.stderr.splitlines() or [""])[-1])
print("left", os.path.exists(closed[0]), session)
if os.environ.get("RAY_AUTH_MODE") != "disabled":
    with connected(PipelineConfig(actors=1, preparers=1), BackboneConfig(), 1):
        print("again", ray.get(ray.remote(lambda: 2).remote()))
"""


def owner(mode: dict[str, str], *tokens: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", OWNER, STRANGER, *tokens],
        env=kept | mode | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_runs_own_ray_refuses_other_clients() -> None:
    with TemporaryDirectory(prefix="x", dir="/tmp") as home:
        base = Path(home, "y" * (ray_session._LONGEST_BASE - len(home) - 1))  # the longest path that Ray can use
        mode, session, *strangers, left, again = owner(
            {"RAY_TMPDIR": str(base)}, "", "a-token-that-is-not-its-own-00000"
        )
        assert left.startswith(f"left False {base}/") and not list(base.iterdir()), "the folder is deleted with the run"
    assert again == "again 2", "one process may start several, one after another"
    assert session == "session True True", "the folder is closed to other users"
    assert mode.startswith("mode token 1 127.0.0.1:")
    assert len(strangers) == 2
    assert all(line.startswith("stranger 1 ") and "AuthenticationError" in line for line in strangers)


def test_authentication_is_off_if_the_user_disabled_it() -> None:
    mode, _, stranger, _ = owner({"RAY_AUTH_MODE": "disabled"}, "")
    assert mode.startswith("mode disabled 1 127.0.0.1:")
    assert stranger.startswith("stranger 0 ") and "session_name" in stranger


def test_a_folder_that_ray_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "y" * ray_session._LONGEST_BASE)
    with pytest.raises(InputError, match="^RAY_TMPDIR: '/tmp/y*' is longer than .. bytes"):
        ray_session._new_session()
    (tmp_path / "f").write_text("")
    monkeypatch.setattr(ray_session, "_LONGEST_BASE", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "f" / "g"))
    with pytest.raises(InputError, match=r"^RAY_TMPDIR: no folder can be made in .* \(Not a directory\)"):
        ray_session._new_session()
