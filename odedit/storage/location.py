"""Where the user's files are: local paths and every address that pyarrow reads (`s3://`, `gs://`, `file://`, ...)."""

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
_COPIED_AT_ONCE = 8 * 2**20
_THREADS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """A file or folder on some file system. It can be pickled, so a worker can be handed one.

    Every operation that a storage refuses for a while is tried again for about a minute (`odedit.storage.retries`).
    A file that is written is seen whole or not at all. Folders are more than a part of the name only where
    `make_folder` makes them.

    Attributes:
        text: What the user wrote, without secrets: messages repeat it, and those end up in results and logs.
        filesystem: Knows how to open `path`.
        path: The place on that file system, without a trailing slash unless it is the top, `/` (or empty).
        small: The same file system, as it takes a small object in one request; None: the file system itself.
        patience_s: How long something is tried; None: `odedit.storage.retries.PATIENCE_S`.
    """

    text: str
    filesystem: FileSystem
    path: str
    small: FileSystem | None = None
    patience_s: float | None = None

    def __str__(self) -> str:
        """What a user types to get here."""
        return self.path if self.is_local else self.text

    def __fspath__(self) -> str:
        """For what reads local files alone. Raises ValueError for an address."""
        if not self.is_local:
            raise ValueError(f"{self.text} is no local file.")
        return self.path

    def __truediv__(self, relative: str) -> Location:
        return self.child(relative)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def parent(self) -> Location:
        """The folder that this lies in; the top's is the top itself."""
        path = self.path.rpartition("/")[0] or self.path[: self.path.startswith("/")]
        return replace(self, text=above(self.text), path=path)

    def child(self, relative: str) -> Location:
        """The place `relative` below this one. `relative` is taken as it is: check it first if a user wrote it."""
        path = f"{self.path.removesuffix('/')}/{relative}" if self.path else relative
        return replace(self, text=below(self.text, relative), path=path)

    def with_patience(self, seconds: float) -> Location:
        """The same place, where something is tried again for so long; 0: not at all."""
        return replace(self, patience_s=seconds)

    def _patiently(self, act: Callable[[], T]) -> T:
        return retried(act, self.patience_s)

    def info(self) -> FileInfo:
        """Type and size. A request or two on a remote file system."""
        return self._patiently(lambda: self.filesystem.get_file_info(self.path))

    def exists(self) -> bool:
        """Whether there is a file, or on this machine's own file system a folder. One request on a remote one."""
        return self._patiently(self._exists)

    def _exists(self) -> bool:
        if self.is_local:
            return os.path.exists(self.path)
        try:
            self.filesystem.open_input_file(self.path).close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_file(self) -> bool:
        return bool(self.info().type == FileType.File)

    def is_folder(self) -> bool:
        return bool(self.info().type == FileType.Directory)

    def open(self) -> NativeFile | PatientStream:
        """Opens for reading at any position. Raises OSError as the file system does."""
        if self.is_local:
            return self._patiently(lambda: self.filesystem.open_input_file(self.path))
        return PatientStream(lambda: self.filesystem.open_input_file(self.path), self.patience_s)

    def read_bytes(self) -> bytes:
        """The file's content. Raises FileNotFoundError if it is not there."""
        with self.open() as stream:
            return bytes(stream.read())

    def read_text(self) -> str:
        """The file's content, which is UTF-8."""
        return self.read_bytes().decode("utf-8")

    def names(self, pattern: str = "*") -> list[str]:
        """What the folder holds, files and folders, by their sorted names; nothing if there is no folder."""
        matches = re.compile(fnmatch.translate(pattern)).match
        return sorted(name for name in self._patiently(self._names) if matches(name))

    def _names(self) -> list[str]:
        if self.is_local:
            try:
                return os.listdir(self.path)
            except (FileNotFoundError, NotADirectoryError):
                return []
        found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return [info.base_name for info in found]

    def glob(self, pattern: str = "*") -> list[Location]:
        """The files and folders of those names."""
        return [self.child(name) for name in self.names(pattern)]

    def first_file_below(self, known: Sequence[Location] = ()) -> str | None:
        """The path of any file in the folder or a folder in it, but the known ones; None if there is none."""
        paths = {location.path for location in known}

        def find() -> str | None:
            found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True, recursive=True))
            files = (info.path for info in found if info.type == FileType.File)
            return next((path for path in files if path not in paths), None)

        return self._patiently(find)

    def make_folder(self) -> None:
        """Makes a folder of this machine's file system, those above it included; elsewhere names are enough."""
        if self.is_local:
            self._patiently(lambda: os.makedirs(self.path, exist_ok=True))

    def delete(self) -> None:
        """Deletes the file, if it is there."""
        self._patiently(self._delete)

    def _delete(self) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.is_local:
                os.unlink(self.path)
            else:
                self.filesystem.delete_file(self.path)

    def write_bytes(self, data: Any) -> None:
        """Writes the whole file.

        Args:
            data: Bytes, or what has a buffer of them.
        """
        if self.is_local:
            self._patiently(lambda: write_atomically(Path(self.path), lambda path: path.write_bytes(data)))
        else:
            self._patiently(lambda: self._upload(data))

    def write_text(self, text: str) -> None:
        """Writes the whole file, as UTF-8."""
        self.write_bytes(text.encode("utf-8"))

    def write_with(self, write: Callable[[Path], object]) -> None:
        """Lets `write` fill a local file, which then appears here: for what does not fit in memory."""
        if self.is_local:
            self._patiently(lambda: write_atomically(Path(self.path), write))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            write(path)
            self.take(path)

    def take(self, path: Path) -> None:
        """Makes a local file this one; on the same local file system by its name, so that `path` is gone."""
        if self.is_local:
            self._patiently(lambda: os.replace(path, self.path))
        elif path.stat().st_size:
            with pyarrow.memory_map(str(path)) as stream:
                self.write_bytes(stream.read_buffer())
        else:
            self.write_bytes(b"")

    def write_once(self, text: str) -> None:
        """Writes a file unless it is there; of several writers the first wins, and all read the same afterwards.

        Where there are no hard links, two writers at the same moment may each believe that they are the first.
        """
        if self.is_local:
            self._patiently(lambda: link_once(Path(self.path), text))
        elif not self.exists():
            self.write_text(text)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """The file where programs that read local files alone find it: its own path, or a copy inside the block."""
        if self.is_local:
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            with self.open() as stream, path.open("wb") as target:
                shutil.copyfileobj(stream, target, _COPIED_AT_ONCE)
            yield path

    def _upload(self, data: Any) -> None:
        try:
            self._put(data)
        except FileNotFoundError:  # where folders are more than a part of the name
            self.filesystem.create_dir(self.path.rpartition("/")[0], recursive=True)
            self._put(data)

    def _put(self, data: Any) -> None:
        """Uploads what is small in one request, and the rest in parts that become an object when all have arrived.

        Where a file system shows what there is so far (HDFS), a reader may see it.
        """
        is_small = memoryview(data).nbytes <= SMALL_BYTES
        filesystem = self.small if is_small and self.small is not None else self.filesystem

        def upload() -> None:
            with filesystem.open_output_stream(self.path) as stream:
                stream.write(data)

        # In a thread, which no Ctrl-C reaches: a stream that is left before its write is closed as an empty object.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(upload).result()


Place = Location | Path | str
"""Where a file is: what the user wrote, or what is known already."""


def at(place: Place, setting: str = "path") -> Location:
    """The location of a place. Raises InputError as `locate` does."""
    return place if isinstance(place, Location) else locate(str(place), setting)


def delete_all(files: Sequence[Location]) -> None:
    """Deletes many files; on an object store that is mostly waiting, which goes together."""
    if files and files[0].is_local:
        for file in files:
            file.delete()
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        deque(pool.map(Location.delete, files), maxlen=0)


def copy_folder(source: Path, target: Location, last: str) -> None:
    """Copies a local folder's files, the one of the name `last` after all others: where it is, all are."""
    paths = [path for path in source.rglob("*") if path.is_file() and path != source / last]

    def copy(path: Path) -> None:
        target.child(path.relative_to(source).as_posix()).write_bytes(path.read_bytes())

    with ThreadPoolExecutor(_THREADS) as pool:
        deque(pool.map(copy, paths), maxlen=0)
    copy(source / last)


def locate(text: str, setting: str) -> Location:
    """Finds the file system behind a path or an address.

    Args:
        text: A local path (`~` is the home folder), or an address such as `s3://bucket/coco`.
        setting: The configuration key it came from, named in errors.

    Raises:
        InputError: The address has a scheme that pyarrow cannot read, or its server does not answer.
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
        ) from None  # pyarrow repeats the address, and a traceback would show it
    except OSError as error:
        raise InputError(
            f"{setting}: cannot reach {masked(text)!r} ({masked(str(error))}). "
            "Check the name, the network and the credentials."
        ) from None
    return Location(masked(text), filesystem, _trimmed(path), _for_small_objects(text, filesystem))


def _for_small_objects(text: str, filesystem: FileSystem) -> FileSystem | None:
    """S3 as it takes a small object in one request instead of three."""
    if filesystem.type_name != "s3" or "allow_delayed_open" in text:
        return None
    option = "allow_delayed_open=true"
    try:
        return FileSystem.from_uri(f"{text}{'&' if '?' in text else '?'}{option}")[0]
    except pyarrow.ArrowInvalid:  # a pyarrow that does not know it
        return None


def _trimmed(path: str) -> str:
    return path.rstrip("/") or path[:1]
