"""Where the user's files are: local paths and every address that pyarrow reads (`s3://`, `gs://`, `file://`, ...)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import pyarrow
from pyarrow import NativeFile
from pyarrow.fs import FileInfo, FileSystem, FileType, LocalFileSystem

from odedit.errors import InputError

# `user:password@`, also where a password was not encoded and has an `@` or, if there is no port before it, a `/`.
# Both patterns are written so that no text, which may be a record's, takes more than linear time.
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s:]*:(?!\d*/)\S{0,500})@")
_SECRET_PARAMETER = re.compile(
    r"""(?<=[?&])(?=[^=&?\s]*=)([^=&?\s]*(?:key|secret|token|password|sas|sig|credential)[^=&?\s]*)=[^&\s'"<>]*""",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text without user names, passwords and access keys in its addresses: what is shown or stored.

    >>> masked("https://me:secret@mlflow.example/api")
    'https://***@mlflow.example/api'
    >>> masked("abfs://records@account/coco?sas_token=secret&region=x")
    'abfs://***@account/coco?sas_token=***&region=x'
    """
    return _SECRET_PARAMETER.sub(r"\1=***", _USER_INFO.sub("***@", text))


@dataclass(frozen=True)
class Location:
    """A file or folder on some file system. It can be pickled, so a worker can be handed one.

    Attributes:
        text: What the user wrote, without secrets: messages repeat it, and those end up in results and logs.
        filesystem: Knows how to open `path`.
        path: The place on that file system, without a trailing slash unless it is the top, `/` (or empty).
    """

    text: str
    filesystem: FileSystem
    path: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def child(self, relative: str) -> Location:
        """The place `relative` below this one. `relative` is taken as it is: check it first if a user wrote it."""
        path = f"{self.path.removesuffix('/')}/{relative}" if self.path else relative
        return Location(f"{self.text.removesuffix('/')}/{relative}", self.filesystem, path)

    def info(self) -> FileInfo:
        """Type and size. One request on a remote file system."""
        return self.filesystem.get_file_info(self.path)

    def is_file(self) -> bool:
        return bool(self.info().type == FileType.File)

    def is_folder(self) -> bool:
        return bool(self.info().type == FileType.Directory)

    def open(self) -> NativeFile:
        """Opens for reading at any position. Raises OSError as the file system does."""
        return self.filesystem.open_input_file(self.path)


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
    return Location(masked(text), filesystem, _trimmed(path))


def _trimmed(path: str) -> str:
    return path.rstrip("/") or path[:1]
