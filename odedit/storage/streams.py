"""A file that is read at any position, and opened again when its storage has refused for a while."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from pyarrow import NativeFile

from odedit.storage.retries import retried


class PatientStream(io.RawIOBase):
    """Reads like the file that `opened` opens; every read is tried again as `odedit.storage.retries` has it.

    Args:
        opened: Opens the file at its start; called once at first, and again after a failure.
        patience_s: As for `retried`.
    """

    def __init__(self, opened: Callable[[], NativeFile], patience_s: float | None = None) -> None:
        super().__init__()
        self._opened, self._patience_s = opened, patience_s
        self._file: NativeFile | None = None
        self._position = 0
        self._size = int(self._patiently(lambda file: file.size()))

    def _patiently(self, act: Callable[[NativeFile], Any]) -> Any:
        def attempt() -> Any:
            if self._file is None:
                self._file = self._opened()
            try:
                return act(self._file)
            except OSError:
                self._file = None
                raise

        return retried(attempt, self._patience_s)

    def size(self) -> int:
        """Bytes in the file."""
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
