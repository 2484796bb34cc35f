"""A local S3-compatible server that can refuse requests and be stopped for a while."""

from __future__ import annotations

import os
import secrets
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from tests.support.services import free_port

BUCKET = "odedit"


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Logs nothing."""


@dataclass
class ObjectStore:
    """The server; its objects survive a stop.

    Attributes:
        port: Port on 127.0.0.1.
        answer: Function of a request's method and path with query; returns an HTTP status to refuse it with, or None.
        requests: All requests, such as `PUT /odedit/name`.
    """

    port: int
    answer: Callable[[str, str], int | None] = lambda method, path: None
    requests: list[str] = field(default_factory=list)
    _server: BaseWSGIServer | None = None

    def __post_init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"] + ("?" + environ["QUERY_STRING"] if environ["QUERY_STRING"] else "")
        self.requests.append(f"{environ['REQUEST_METHOD']} {path}")
        status = self.answer(environ["REQUEST_METHOD"], path)
        if status is None:
            return self._app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{status} refused", [("Content-Type", "application/xml"), ("Content-Length", "0")])
        return []

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self.port, self, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stops the server; connections are refused."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects, without markers of folders."""
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys
        return sorted(name for name in keys if name.startswith(prefix) and not name.endswith("/"))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for access to the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A server with an empty bucket; inside the block, the environment names it."""
    store = ObjectStore(free_port())
    store.start()
    with mock.patch.dict(os.environ, store.environment):
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{store.port}/{BUCKET}", method="PUT")).close()
        try:
            yield store
        finally:
            store.stop()
            s3_backends.reset()
