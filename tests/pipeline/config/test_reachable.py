"""Checks, before a run, that its servers can be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from odedit.errors import InputError
from odedit.storage.location import at
from pipeline.config.reachable import check_server
from pipeline.config.run import TrackingConfig
from pipeline.tracking import connection
from tests.support.services import free_port


def test_a_port_is_tried_unless_the_query_names_another_place() -> None:
    port = free_port()
    for address in (f"postgresql://u@127.0.0.1:{port}/db", f"mysql+pymysql://u@127.0.0.1:{port}/db?charset=utf8mb4"):
        with pytest.raises(
            InputError, match=f"^tracking.uri: no server answers at .*127.0.0.1, port {port}: Connection"
        ):
            check_server(address, "tracking.uri")
    check_server(f"mysql+pymysql://u@127.0.0.1:{port}/db?unix_socket=/run/mysqld/mysqld.sock", "tracking.uri")
    check_server(f"postgresql+psycopg://u@127.0.0.1:{port}/db?host=/run/postgresql", "tracking.uri")


@pytest.fixture
def silent() -> Iterator[int]:
    """Port of a server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_database_that_takes_the_connection_and_is_silent_is_given_up(
    silent: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(connection, "_CHECK_TIMEOUT_S", 0.2)
    config = TrackingConfig(uri=f"postgresql+psycopg://me@127.0.0.1:{silent}/db")
    with pytest.raises(InputError, match="cannot be used \\(the database has not answered within 0.2 s\\)"):
        connection.check(config, at(tmp_path))
