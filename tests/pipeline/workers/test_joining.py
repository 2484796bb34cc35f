"""Joining a cluster: the choice of the token, and the message of a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated import ray_client_pb2 as messages
from ray.core.generated import ray_client_pb2_grpc as services

from odedit.errors import InputError
from pipeline.config.run import PipelineConfig
from pipeline.workers import joining, probe, ray_session


class RayClientServer(services.RayletDriverServicer):
    """Answers requests with its token, like a cluster's head at its port for Ray Client."""

    def ClusterInfo(self, request: Any, context: grpc.ServicerContext) -> Any:
        if dict(context.invocation_metadata()).get("authorization") != "Bearer right":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid or missing authentication token")
        return messages.ClusterInfoResponse(json="{}")


@pytest.fixture
def client_server() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    services.add_RayletDriverServicer_to_server(RayClientServer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"ray://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The cluster's answers by mode, which tests fill in; the user's own login is hidden."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(joining, "_accepted", {})
    answers: dict[str, str] = {}

    def ask(address: str, mode: str) -> tuple[int, str]:
        answer = answers.get(mode, "refused")
        return (0, "") if answer == "ok" else (probe.REFUSED, "") if answer == "refused" else (1, answer)

    monkeypatch.setattr(joining, "_ask", ask)
    return answers


def test_the_token_of_the_environment_or_a_file_is_used(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster["disabled"] = "ok"
    assert joining.login_to("host:1") == {"RAY_AUTH_MODE": "disabled"}
    (tmp_path / ".ray").mkdir()
    file = tmp_path / ".ray" / "auth_token"
    file.write_text("of another cluster")
    assert joining.login_to("host:2") == {"RAY_AUTH_MODE": "disabled"}, "the file is used only if the cluster asks"
    cluster |= {"disabled": "refused", "token": "ok"}
    assert joining.login_to("host:3") == {"RAY_AUTH_MODE": "token"}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert joining.login_to("host:4") == {"RAY_AUTH_MODE": "token"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match="asks for a token"):
        joining.login_to("host:5")


def test_a_refusal_names_the_reason(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^pipeline.ray_address: the cluster at host:1 asks for a token, and none is"):
        joining.login_to("host:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret")
    with pytest.raises(
        InputError, match="^pipeline.ray_address: the cluster at host:1 refuses the token in RAY_AUTH_TOKEN\\."
    ) as caught:
        joining.login_to("host:1")
    assert "a-secret" not in str(caught.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    for content, expected in ((None, "cannot be read (No such file or directory)"), (" \n", "is empty")):
        file = tmp_path / "token"
        if content is not None:
            file.write_text(content)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
        with pytest.raises(InputError) as caught:
            joining.login_to("host:1")
        assert str(caught.value).startswith(f"RAY_AUTH_TOKEN_PATH: the token's file {file} {expected}")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    cluster["disabled"] = "Connection refused"
    with pytest.raises(InputError, match=r"no Ray answers at 'host:1' \(Connection refused\)"):
        joining.login_to("host:1")


def test_an_address_where_nothing_answers_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match=r"no Ray answers at '127.0.0.1:1' \(.*Connection refused"):
        joining.login_to("127.0.0.1:1")


@pytest.mark.parametrize("address", ["host:1", "ray://host:1", "auto"])
def test_a_cluster_is_asked_once(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, no_ray: Callable[[], Any], address: str
) -> None:
    cluster["disabled"] = "ok"
    asked: list[str] = []
    answer = joining._ask
    monkeypatch.setattr(joining, "_ask", lambda *arguments: asked.append(arguments[0]) or answer(*arguments))
    pipeline = PipelineConfig(ray_address=address)
    ray_session.check_reachable(pipeline)
    for _ in range(2):
        with pytest.raises(InputError, match="no Ray answers"), ray_session._cluster(address):
            pass
    assert asked == [address]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client without a connection."""
    import ray

    def init(**settings: object) -> None:
        raise ConnectionError("not in this test")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)


def test_a_server_for_ray_client_asks_for_the_token_as_well(
    client_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    pipeline = PipelineConfig(ray_address=client_server)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(InputError, match="refuses the token in RAY_AUTH_TOKEN"):
        ray_session.check_reachable(pipeline)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("right")
    ray_session.check_reachable(pipeline)
    assert joining.login_to(client_server) == {"RAY_AUTH_MODE": "token"}
