"""Joining a cluster: which token is used, what is waited for, and what is said where it does not come."""

from __future__ import annotations

import io
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from odedit.errors import InputError
from pipeline import joining, probe
from pipeline.config import BackboneConfig, PipelineConfig, from_dict
from pipeline.graph import GraphError
from pipeline.spec import Plan, make_plan, shortage

PLAN = Plan("cpu", 2, 4, 0.0, 1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Modes that the cluster was asked in, with its answers to them; nothing of the user's own is in the way."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    answers: dict[str, str] = {}

    def ask(address: str, mode: str) -> tuple[int, str]:
        answer = answers.get(mode, "refused")
        return (0, "") if answer == "ok" else (probe.REFUSED, "") if answer == "refused" else (1, answer)

    monkeypatch.setattr(joining, "_ask", ask)
    return answers


def test_a_token_is_used_where_the_environment_or_a_file_has_one(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster["disabled"] = "ok"
    assert joining.login("host:1") == {"RAY_AUTH_MODE": "disabled"}
    (tmp_path / ".ray").mkdir()
    file = tmp_path / ".ray" / "auth_token"
    file.write_text("of another cluster")
    assert joining.login("host:1") == {"RAY_AUTH_MODE": "disabled"}, "the file is used only where it is asked for"
    cluster |= {"disabled": "refused", "token": "ok"}
    assert joining.login("host:1") == {"RAY_AUTH_MODE": "token"}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert joining.login("host:1") == {"RAY_AUTH_MODE": "token"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match="asks for a token"):
        joining.login("host:1")


def test_a_refusal_says_what_was_wrong(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="^pipeline.ray_address: the cluster at host:1 asks for a token, and none is"):
        joining.login("host:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret")
    with pytest.raises(
        InputError, match="^pipeline.ray_address: the cluster at host:1 refuses the token in RAY_AUTH_TOKEN\\."
    ) as caught:
        joining.login("host:1")
    assert "a-secret" not in str(caught.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    for content, expected in ((None, "cannot be read (No such file or directory)"), (" \n", "is empty")):
        file = tmp_path / "token"
        if content is not None:
            file.write_text(content)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
        with pytest.raises(InputError) as caught:
            joining.login("host:1")
        assert str(caught.value).startswith(f"RAY_AUTH_TOKEN_PATH: the token's file {file} {expected}")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    cluster["disabled"] = "Connection refused"
    with pytest.raises(InputError, match=r"no Ray answers at 'host:1' \(Connection refused\)"):
        joining.login("host:1")


def test_an_address_where_nothing_answers_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match=r"no Ray answers at '127.0.0.1:1' \(.*Connection refused"):
        joining.login("127.0.0.1:1")


def test_what_a_cluster_lacks_is_counted() -> None:
    gpus = make_plan(PipelineConfig(device="cuda", actors=2), BackboneConfig(), 8, 1.0, 10)
    assert shortage(gpus, 8, 1) == "2 actors of 1 GPU each were asked for, the cluster has 1"
    assert shortage(gpus, 8, 2) == ""
    assert shortage(PLAN, 4, 0).endswith("need 7 cores, the cluster has 4")
    with pytest.raises(InputError, match="wait_s: got -1"):
        from_dict({"pipeline": {"wait_s": -1}})


def test_nodes_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_POLL_S", 0.01)
    monkeypatch.setattr(joining, "_asked_for", lambda plan: nullcontext())
    missing, stream = ["two GPUs", "a GPU", ""], io.StringIO()
    assert joining.awaited(lambda: (PLAN, missing.pop(0)), 60, Console(file=stream, width=200)) is PLAN
    assert stream.getvalue() == "Waiting for the cluster, for at most 60 s (pipeline.wait_s): two GPUs.\n"
    with pytest.raises(InputError, match=r"^pipeline.actors: two GPUs; nothing was added within 0.05 s \(pipeline.w"):
        joining.awaited(lambda: (PLAN, "two GPUs"), 0.05, None)


def test_a_cluster_that_loses_its_nodes_ends_the_run_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_POLL_S", 0.01)
    states = ["", "no node", "", *["no node"] * 1000]
    monkeypatch.setattr(joining, "lacking", lambda plan: states.pop(0))
    expected = "^The cluster has lost what the run needs: no node; nothing was added within 0.1 s"
    with pytest.raises(GraphError, match=expected), joining.watched(PLAN, 0.1, None):
        time.sleep(30)
    monkeypatch.setattr(joining, "lacking", lambda plan: "")
    with joining.watched(PLAN, 0.0, None):
        time.sleep(0.1)
    with pytest.raises(KeyError), joining.watched(PLAN, 0.0, None):
        raise KeyError
