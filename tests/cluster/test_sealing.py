"""Variables of a job are sent encrypted, and only a process with the cluster's token can decrypt them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster import login, sealing, submit

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


@pytest.mark.parametrize("token", ["another", " "])
def test_with_another_token_or_none_the_command_ends_with_a_sentence(token: str) -> None:
    done = run_sealed(sealing.seal(VALUES, "token of the cluster"), token, "-m|odedit|study|list")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("--env: the variables cannot be decrypted where the job runs"), done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Home folder of a user without Ray's variables in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(name, "")  # registers the variable, so that the test's own changes are undone, too
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        (tmp_path / ".ray").mkdir()
        yield tmp_path
    login.read_again()


@pytest.mark.parametrize(("token", "mode"), [("of the cluster", "token"), ("", "disabled")])
def test_variables_are_sent_in_clear_only_where_there_is_no_token(
    home: Path, monkeypatch: pytest.MonkeyPatch, token: str, mode: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    runtime: dict[str, Any] = {"env_vars": {"A": "b"}}
    notes: list[str] = []
    submit._pass_variables(dict(VALUES), runtime, notes)
    assert ("s3cr3t" not in str(runtime)) == bool(token) and bool(notes) == (not token)
    assert (runtime.get("worker_process_setup_hook") == "cluster.sealing.unseal") == bool(token)
    assert runtime["env_vars"]["A"] == "b"


@pytest.mark.parametrize("variable", [" \n", None])
def test_without_a_token_nothing_is_sealed(home: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    """Anyone could decrypt variables that are encrypted with an empty token."""
    (home / ".ray" / "auth_token").write_text("\n")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if variable is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", variable)
    runtime: dict[str, Any] = {"env_vars": {}}
    with pytest.raises(submit.JobError, match="is empty. Set RAY_AUTH_TOKEN"):
        submit._pass_variables(dict(VALUES), runtime, [])
    assert runtime == {"env_vars": {}}
    with pytest.raises(submit.JobError, match="token is empty"):
        sealing.seal(VALUES, "")


class Dashboard(BaseHTTPRequestHandler):
    """Dashboard that answers with its version, if the request has its token."""

    token = ""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        status = 200 if not self.token or given == f"Bearer {self.token}" else 403 if given else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.60.0", "version": "4"}).encode())

    def log_message(self, *arguments: object) -> None:
        """Suppresses the log."""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Dashboard, "token", "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_users_own_token_file_is_used_where_the_cluster_asks_for_it(
    home: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".ray" / "auth_token").write_text("secret of another cluster\n")
    submit._client(dashboard)
    runtime: dict[str, Any] = {"env_vars": {}}
    submit._pass_variables(dict(VALUES), runtime, [])
    assert runtime == {"env_vars": VALUES}, "the nodes of a cluster without token could not decrypt them"

    monkeypatch.setattr(Dashboard, "token", "secret")
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(submit.JobError, match=r"^--address: the cluster at .* refuses the token in .*/auth_token\."):
        submit._client(dashboard)
    monkeypatch.delenv("RAY_AUTH_MODE")
    (home / ".ray" / "auth_token").write_text("secret\n")
    submit._client(dashboard)
    runtime = {"env_vars": {}}
    submit._pass_variables(dict(VALUES), runtime, [])
    assert runtime["env_vars"].keys() == {sealing.SEALED}


def test_a_login_that_cannot_be_is_explained(home: Path, dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dashboard, "token", "secret")
    with pytest.raises(submit.JobError, match="asks for a token, and none is given. Set RAY_AUTH_TOKEN"):
        submit._client(dashboard)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    with pytest.raises(submit.JobError, match="^RAY_AUTH_TOKEN_PATH: the token's file .*none cannot be read"):
        submit._client(dashboard)
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    with pytest.raises(submit.JobError, match="^RAY_AUTH_MODE: got 'tokens', expected token or disabled"):
        submit._client(dashboard)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(submit.JobError, match="no cluster takes jobs at http://127.0.0.1:1"):
        submit._client("http://127.0.0.1:1")


def test_without_any_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sealing.SEALED, raising=False)
    before = dict(os.environ)
    sealing.unseal()
    assert dict(os.environ) == before
