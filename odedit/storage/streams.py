"""Random-access stream of a remote file that reopens it after transient errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from pyarrow import NativeFile

from odedit.storage.retries import retried


class PatientStream(io.RawIOBase):
    """Read-only stream that retries every read; see `odedit.storage.retries`.

    Args:
        open_file: Opens the file at its start; called again after a failure.
        patience_s: Seconds of retries, as for `retried`.
    """

    def __init__(self, open_file: Callable[[], NativeFile], patience_s: float | None = None) -> None:
        super().__init__()
        self._open_file, self._patience_s = open_file, patience_s
        self._file: NativeFile | None = None
        self._position = 0
        self._size = int(self._patiently(lambda file: file.size()))

    def _patiently(self, act: Callable[[NativeFile], Any]) -> Any:
        def attempt() -> Any:
            if self._file is None:
                self._file = self._open_file()
            try:
                return act(self._file)
            except OSError:
                self._file = None
                raise

        return retried(attempt, self._patience_s)

    def size(self) -> int:
        """Size of the file in bytes."""
        return self._size

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._size if size is None or size < 0 else size

        def read(file: NativeFile) -> bytes:
            file.seek(self._position)
            return bytes(file.read(wanted))

        data: bytes = self._patiently(read)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, min(start + offset, self._size))
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()
