"""Locations of files: local paths and the addresses that pyarrow reads (`s3://`, `gs://`, `file://`, ...)."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow
from pyarrow import NativeFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from odedit.errors import InputError
from odedit.runtime.addresses import above, below, masked
from odedit.storage.atomic import link_once, write_atomically
from odedit.storage.retries import retried
from odedit.storage.streams import PatientStream

SMALL_BYTES = 4 * 2**20
"""Objects up to this size are written in one request."""
_COPY_BYTES = 8 * 2**20
_THREADS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """A file or folder on a local or remote file system. Picklable.

    Operations that fail with a transient error are retried for about a minute (`odedit.storage.retries`). Writes are
    atomic. On an object store a folder is only a prefix of names, and need not be created.

    Attributes:
        text: Path or address as the user wrote it, passwords masked: messages, results and logs show it.
        filesystem: File system of `path`.
        path: Path on that file system, without a trailing slash unless it is the root (`/` or empty).
        small: Variant of the file system that writes a small object in one request; None: `filesystem`.
        patience_s: Seconds of retries; None: `odedit.storage.retries.PATIENCE_S`.
    """

    text: str
    filesystem: FileSystem
    path: str
    small: FileSystem | None = None
    patience_s: float | None = None

    def __str__(self) -> str:
        """The path or address that a user would type."""
        return self.path if self.is_local else self.text

    def __fspath__(self) -> str:
        """Local path. Raises ValueError for an address."""
        if not self.is_local:
            raise ValueError(f"{self.text} is not a local file.")
        return self.path

    def __truediv__(self, relative: str) -> Location:
        return self.child(relative)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def parent(self) -> Location:
        """Parent folder; the root is its own parent."""
        path = self.path.rpartition("/")[0] or self.path[: self.path.startswith("/")]
        return replace(self, text=above(self.text), path=path)

    def child(self, relative: str) -> Location:
        """Location of `relative` below this location. `relative` is not validated: check untrusted paths first."""
        path = f"{self.path.removesuffix('/')}/{relative}" if self.path else relative
        return replace(self, text=below(self.text, relative), path=path)

    def with_patience(self, seconds: float) -> Location:
        """The same location with another duration of retries; 0: none."""
        return replace(self, patience_s=seconds)

    def _patiently(self, act: Callable[[], T]) -> T:
        return retried(act, self.patience_s)

    def info(self) -> FileInfo:
        """Type and size; one or two requests on a remote file system."""
        return self._patiently(lambda: self.filesystem.get_file_info(self.path))

    def exists(self) -> bool:
        """True when a file exists, or locally a file or folder. One request on a remote file system."""
        return self._patiently(self._exists)

    def _exists(self) -> bool:
        if self.is_local:
            return os.path.exists(self.path)
        try:
            self.filesystem.open_input_file(self.path).close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def delete_folder(self) -> None:
        """Deletes a folder with everything in it, if it exists."""
        if self.is_local:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with suppress(FileNotFoundError):
            self._patiently(lambda: self.filesystem.delete_dir(self.path))

    def is_file(self) -> bool:
        return bool(self.info().type == FileType.File)

    def is_folder(self) -> bool:
        return bool(self.info().type == FileType.Directory)

    def open(self) -> NativeFile | PatientStream:
        """Opens the file for random access. Raises OSError."""
        if self.is_local:
            return self._patiently(lambda: self.filesystem.open_input_file(self.path))
        return PatientStream(lambda: self.filesystem.open_input_file(self.path), self.patience_s)

    def read_bytes(self) -> bytes:
        """Content of the file. Raises FileNotFoundError if it is missing."""
        with self.open() as stream:
            return bytes(stream.read())

    def read_text(self) -> str:
        """Content of a UTF-8 file."""
        return self.read_bytes().decode("utf-8")

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names of the files and folders in a folder; empty if there is no folder."""
        matches = re.compile(fnmatch.translate(pattern)).match
        return sorted(name for name in self._patiently(self._names) if matches(name))

    def _names(self) -> list[str]:
        if self.is_local:
            try:
                return os.listdir(self.path)
            except (FileNotFoundError, NotADirectoryError):
                return []
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return [info.base_name for info in infos]

    def glob(self, pattern: str = "*") -> list[Location]:
        """Files and folders whose names match the pattern, sorted."""
        return [self.child(name) for name in self.names(pattern)]

    def first_file_below(self, known: Sequence[Location] = ()) -> str | None:
        """Path of a file at any depth below the folder that is not in `known`; None if there is none."""
        paths = {location.path for location in known}

        def find() -> str | None:
            infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True, recursive=True))
            files = (info.path for info in infos if info.type == FileType.File)
            return next((path for path in files if path not in paths), None)

        return self._patiently(find)

    def make_folder(self) -> None:
        """Creates a local folder and its parents; does nothing on a remote file system."""
        if self.is_local:
            self._patiently(lambda: os.makedirs(self.path, exist_ok=True))

    def delete(self) -> None:
        """Deletes the file if it exists."""
        self._patiently(self._delete)

    def _delete(self) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.is_local:
                os.unlink(self.path)
            else:
                self.filesystem.delete_file(self.path)

    def write_bytes(self, data: Any) -> None:
        """Writes the file.

        Args:
            data: Bytes-like object.
        """
        if self.is_local:
            self._patiently(lambda: write_atomically(Path(self.path), lambda path: path.write_bytes(data)))
        else:
            self._patiently(lambda: self._upload(data))

    def write_text(self, text: str) -> None:
        """Writes the file as UTF-8."""
        self.write_bytes(text.encode("utf-8"))

    def write_with(self, write: Callable[[Path], object]) -> None:
        """Lets `write` fill a local file, then moves or uploads it: for files that do not fit in memory."""
        if self.is_local:
            self._patiently(lambda: write_atomically(Path(self.path), write))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            write(path)
            self.take(path)

    def take(self, path: Path) -> None:
        """Moves a local file here by renaming, or uploads it."""
        if self.is_local:
            self._patiently(lambda: os.replace(path, self.path))
        elif path.stat().st_size:
            with pyarrow.memory_map(str(path)) as stream:
                self.write_bytes(stream.read_buffer())
        else:
            self.write_bytes(b"")

    def write_once(self, text: str) -> None:
        """Writes the file unless it exists. The first of several writers wins.

        Without hard links (object stores), two simultaneous writers may both write; the last one wins.
        """
        if self.is_local:
            self._patiently(lambda: link_once(Path(self.path), text))
        elif not self.exists():
            self.write_text(text)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """Local path of the file: its own, or that of a temporary copy that exists in the block."""
        if self.is_local:
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            with self.open() as stream, path.open("wb") as target:
                shutil.copyfileobj(stream, target, _COPY_BYTES)
            yield path

    def _upload(self, data: Any) -> None:
        try:
            self._put(data)
        except FileNotFoundError:  # a file system with real folders, such as HDFS
            self.filesystem.create_dir(self.path.rpartition("/")[0], recursive=True)
            self._put(data)

    def _put(self, data: Any) -> None:
        """Uploads small data in one request, larger data in parts. On HDFS, readers may see partial files."""
        is_small = memoryview(data).nbytes <= SMALL_BYTES
        filesystem = self.small if is_small and self.small is not None else self.filesystem

        def upload() -> None:
            with filesystem.open_output_stream(self.path) as stream:
                stream.write(data)

        # In a thread, which Ctrl-C does not interrupt: a stream closed before its write would leave an empty object.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(upload).result()


LocationLike = Location | Path | str
"""A location, or its path or address."""


def at(path: LocationLike, setting: str = "path") -> Location:
    """Converts a path or address to a `Location`. Raises InputError as `locate` does."""
    return path if isinstance(path, Location) else locate(str(path), setting)


def delete_all(files: Sequence[Location]) -> None:
    """Deletes many files, on an object store concurrently."""
    if files and files[0].is_local:
        for file in files:
            file.delete()
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        deque(pool.map(Location.delete, files), maxlen=0)


def copy_folder(source: Path, target: Location, last: str) -> None:
    """Copies the files of a local folder concurrently, `last` after all others: it marks a complete copy."""
    paths = [path for path in source.rglob("*") if path.is_file() and path != source / last]

    def copy(path: Path) -> None:
        target.child(path.relative_to(source).as_posix()).write_bytes(path.read_bytes())

    with ThreadPoolExecutor(_THREADS) as pool:
        deque(pool.map(copy, paths), maxlen=0)
    copy(source / last)


def locate(text: str, setting: str) -> Location:
    """Location of a path or an address.

    Args:
        text: Local path (`~` is the home folder), or address such as `s3://bucket/coco`.
        setting: Setting that `text` comes from, for messages.

    Raises:
        InputError: `text` is empty, pyarrow cannot read the address's scheme, or its server does not answer.
    """
    if not text:
        raise InputError(f"{setting}: got an empty path; name a file or folder.")
    if "://" not in text:
        return Location(masked(text), LocalFileSystem(), _trimmed(os.path.abspath(os.path.expanduser(text))))
    try:
        filesystem, path = FileSystem.from_uri(text)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, ImportError) as error:
        raise InputError(
            f"{setting}: cannot use the address {masked(text)!r} ({masked(str(error))}). "
            "Allowed: a local path, or an address that pyarrow reads (file://, s3://, gs://, abfs://, hdfs://, hf://)."
        ) from None  # pyarrow's message, which a traceback would show, repeats the address with its password
    except OSError as error:
        raise InputError(
            f"{setting}: cannot reach {masked(text)!r} ({masked(str(error))}). "
            "Check the name, the network and the credentials."
        ) from None
    return Location(masked(text), filesystem, _trimmed(path), _for_small_objects(text, filesystem))


def _for_small_objects(text: str, filesystem: FileSystem) -> FileSystem | None:
    """S3 file system that writes a small object in one request instead of three; None for other file systems."""
    if filesystem.type_name != "s3" or "allow_delayed_open" in text:
        return None
    option = "allow_delayed_open=true"
    try:
        return FileSystem.from_uri(f"{text}{'&' if '?' in text else '?'}{option}")[0]
    except pyarrow.ArrowInvalid:  # a pyarrow without this option
        return None


def _trimmed(path: str) -> str:
    return path.rstrip("/") or path[:1]
