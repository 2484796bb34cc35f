"""An S3-compatible server on this machine alone, which refuses for a while when it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments: object) -> None:
        pass


class Storage:
    """Keeps objects in memory.

    Attributes:
        refused: Requests that were answered 503.
    """

    def __init__(self) -> None:
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._lock = threading.Lock()
        self._reads_left: int | None = None
        self._pause_s = self._until = 0.0
        self.refused = 0

    def refuse(self, after: int, seconds: float) -> None:
        """Answers 503 for so long, once so many further pictures have been read."""
        with self._lock:
            self._reads_left, self._pause_s = after, seconds

    def address(self, path: str) -> str:
        host = f"127.0.0.1:{self._server.server_port}"
        return f"s3://{BUCKET}/{path}?scheme=http&endpoint_override={host}&region=us-east-1"

    def put(self, folder: Path) -> None:
        """Uploads the folder's files under their paths in it."""
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self._server.server_port}",
            region_name="us-east-1",
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), BUCKET, path.relative_to(folder).as_posix())

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        is_picture = environ["PATH_INFO"].endswith((".jpg", ".png")) and environ["REQUEST_METHOD"] == "GET"
        with self._lock:
            if is_picture and self._reads_left is not None:
                self._reads_left -= 1
                if self._reads_left < 0:
                    self._reads_left, self._until = None, time.monotonic() + self._pause_s
            is_refused = time.monotonic() < self._until
            self.refused += is_refused
        if is_refused:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN]
        return self._app(environ, start_response)  # type: ignore[no-any-return]

    def serve(self) -> None:
        self._server.serve_forever()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def storage() -> Iterator[Storage]:
    one = Storage()
    thread = threading.Thread(target=one.serve)
    thread.start()
    try:
        yield one
    finally:
        one.stop()
        thread.join()
