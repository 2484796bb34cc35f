"""Variables for a job travel encrypted, and a process without the cluster's token cannot read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import sealing, submit

VALUES = {"PLANTED_SECRET": "s3cr3t ü", "OTHER": ""}


def run_sealed(text: str, token: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, sealing.SEALED: text}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, *code.split("|")], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_worker_with_the_token_gets_the_variables() -> None:
    text = sealing.seal(VALUES, "token of the cluster")
    assert "s3cr3t" not in text and text != sealing.seal(VALUES, "token of the cluster")
    code = "import os; from cluster import sealing; sealing.unseal(); print(ascii(os.environ['PLANTED_SECRET']))"
    done = run_sealed(text, " token of the cluster\n", f"-c|{code}")
    assert done.stdout.strip() == ascii("s3cr3t ü"), done.stderr


def test_with_another_token_the_command_ends_with_a_sentence() -> None:
    done = run_sealed(sealing.seal(VALUES, "token of the cluster"), "another", "-m|odedit|study|list")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("--env: the variables cannot be decrypted where the job runs"), done.stderr


@pytest.mark.parametrize(("token", "mode"), [("of the cluster", "token"), ("", "disabled")])
def test_variables_are_sent_in_clear_only_where_there_is_no_token(
    monkeypatch: pytest.MonkeyPatch, token: str, mode: str
) -> None:
    monkeypatch.setattr(sealing, "token", lambda: token)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    runtime: dict[str, Any] = {"env_vars": {"A": "b"}}
    notes: list[str] = []
    submit._hand_on(dict(VALUES), runtime, notes)
    assert ("s3cr3t" not in str(runtime)) == bool(token) and bool(notes) == (not token)
    assert (runtime.get("worker_process_setup_hook") == "cluster.sealing.unseal") == bool(token)
    assert runtime["env_vars"]["A"] == "b"


def test_the_users_own_token_file_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    with pytest.raises(submit.JobError, match="no cluster takes jobs at http://127.0.0.1:1"):
        submit._client("http://127.0.0.1:1")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_without_any_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sealing.SEALED, raising=False)
    before = dict(os.environ)
    sealing.unseal()
    assert dict(os.environ) == before
