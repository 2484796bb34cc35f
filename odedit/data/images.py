"""Reading of the images that records name.

Records are untrusted: a path must not leave its root, and a file may be missing, damaged or a decompression bomb. Each
of these raises `ImageError`, and the run skips the record.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from contextlib import suppress
from typing import Any

from pyarrow.fs import FileType

from odedit.data.cells import CellImages, is_cell_reference
from odedit.data.decoding import ImageError, decode
from odedit.data.fields import Root, shorten
from odedit.data.packed import (
    PackedImages,
    is_embedded_reference,
    is_pack,
    is_pack_reference,
    original_path,
    unreadable_reason,
)
from odedit.data.readers import check_is_file
from odedit.errors import InputError, StorageError
from odedit.inputs.batch import Picture
from odedit.runtime.addresses import masked, relative_note
from odedit.storage.location import Location, locate
from odedit.storage.retries import is_transient

__all__ = ["ImageError", "ImageReader"]

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20
KEY_LENGTH = 32
_ENDINGS = (".jpg", ".jpeg", ".png")


class ImageReader:
    """Reads images under two roots, in a packed folder or in a table. Picklable; opens no file before the first read.

    Args:
        image_root: Folder that `image` and `m_loc` are relative to; None if all images are packed.
        rephrase_root: Folder that `image_rephrase` is relative to; None: `image_root`.
        pack_root: Packed folder that references `pack:...` point into, or file or folder of a table that `cell:...`
            point into.
        max_pixels: Largest width x height.
        max_bytes: Largest file.

    Attributes:
        settings: Name of each root's setting, for messages.
    """

    def __init__(
        self,
        image_root: str | None,
        rephrase_root: str | None = None,
        *,
        pack_root: str | None = None,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        for setting, value in (("data.max_pixels", max_pixels), ("data.max_bytes", max_bytes)):
            if value < 1:
                raise InputError(f"{setting}: got {value}, expected at least 1.")
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        roots: dict[str, tuple[str, str | None]] = {
            "image": ("data.image_root", image_root),
            "rephrase": (
                ("data.image_root", image_root) if rephrase_root is None else ("data.rephrase_root", rephrase_root)
            ),
        }
        self.settings = {root: setting for root, (setting, _) in roots.items()}
        self._roots = {root: locate(text, setting) for root, (setting, text) in roots.items() if text is not None}
        self._packed = None if pack_root is None else PackedImages(locate(pack_root, "data.path"))
        self._cells = None if pack_root is None else CellImages(locate(pack_root, "data.path"))

    @classmethod
    def for_records(
        cls, path: str, image_root: str | None = None, rephrase_root: str | None = None, **limits: Any
    ) -> ImageReader:
        """A reader for records in files, in a packed folder or in a table, of which the last two hold images.

        Args:
            path: File or folder of records.
            image_root: Folder of the images; None only if all are packed or in the table.

        Raises:
            InputError: The records do not exist, or a root does not exist.
        """
        location = locate(path, "data.path")
        if not is_pack(location) and not location.is_folder():
            check_is_file(location)
        reader = cls(image_root, rephrase_root, pack_root=path, **limits)
        reader.check_roots()
        return reader

    def check_roots(self) -> None:
        """Raises InputError if a root does not exist."""
        for root, location in self._roots.items():
            try:
                exists = location.is_folder()
            except OSError as error:
                raise InputError(
                    f"{self.settings[root]}: cannot look at {location.text!r} ({_reason(error)})."
                ) from error
            if not exists:
                note = relative_note(location.path)
                raise InputError(f"{self.settings[root]}: there is no folder {location.text!r}.{note}")

    def location(self, path: str, root: Root = "image") -> Location:
        """Location of an unpacked image. Opens no file; raises ImageError if the path is not allowed."""
        return self._resolve(path, root, image_name(path))

    def similar(self, path: str, root: Root = "image") -> str | None:
        """Path of a local file that differs in its ending or in white space around it; None: there is none."""
        stem, ending = os.path.splitext(path.strip())
        for end in dict.fromkeys((ending, ending.lower(), ending.upper(), *_ENDINGS, *map(str.upper, _ENDINGS))):
            with suppress(ImageError):  # a path that is not allowed
                location = self.location(stem + end, root)
                if stem + end != path and location.is_local and os.path.isfile(location.path):
                    return stem + end
        return None

    def read(self, path: str, root: Root = "image") -> Picture:
        """Reads and decodes one image.

        Raises:
            ImageError: The file is missing, not allowed, or no image; the message names it.
            StorageError: The storage kept failing until the retries ended; the image may be fine.
        """
        data = self.read_bytes(path, root)
        key = hashlib.sha256(data).hexdigest()[:KEY_LENGTH]
        return Picture(key, decode(data, image_name(path), self.max_pixels))

    def read_bytes(self, path: str, root: Root = "image") -> bytes:
        """Content of the file, not decoded. Raises ImageError and StorageError as `read` does."""
        name = image_name(path)
        try:
            is_embedded = is_embedded_reference(path)
            data = self._embedded_bytes(path, name) if is_embedded else self._file_bytes(path, root, name)
        except OSError as error:
            # An error of a local disk concerns this file; one of an object store concerns all files, and may pass.
            if is_transient(error) and not self._is_local(path, root):
                raise StorageError(f"{name}: cannot be read ({_reason(error)}).") from error
            raise ImageError(f"{name}: cannot be read ({_reason(error)}).", "unreadable image") from error
        if not data:
            raise ImageError(f"{name}: the file is empty.", "empty image")
        if len(data) > self.max_bytes:
            raise self._too_many_bytes(name, len(data))
        return data

    def _is_local(self, path: str, root: Root) -> bool:
        if is_cell_reference(path):
            return self._cells is None or self._cells.is_local
        source = self._packed if is_pack_reference(path) else self._roots.get(root)
        return source is None or source.is_local

    def _embedded_bytes(self, reference: str, name: str) -> bytes:
        reason = unreadable_reason(reference)
        if reason is not None:
            raise ImageError(reason, "unreadable when packed")
        source = self._cells if is_cell_reference(reference) else self._packed
        if source is None:
            raise ImageError(
                f"{name}: {shorten(reference)!r} points into a pack or a table, but the records are in neither.",
                "image not found",
            )
        try:
            return source.read(reference)
        except ValueError as error:
            raise ImageError(f"{name}: {error}", "damaged pack") from error

    def _file_bytes(self, path: str, root: Root, name: str) -> bytes:
        location = self._resolve(path, root, name)
        info = location.info()
        if info.type == FileType.NotFound:
            raise self._not_found(path, root, name)
        if info.type != FileType.File:
            raise ImageError(f"{name}: is not a file.", "not an image")
        if info.size is not None and info.size > self.max_bytes:
            raise self._too_many_bytes(name, info.size)
        with location.open() as stream:
            return bytes(stream.read(self.max_bytes + 1))

    def _resolve(self, path: str, root: Root, name: str) -> Location:
        """Location of the file. Raises ImageError if the path would leave its root."""
        if root not in self._roots:
            raise ImageError(f"{name}: {self.settings[root]} is not set.", "image not found")
        base = self._roots[root]
        if base.is_local and path.startswith(f"{base.path}/"):  # a full path under the root
            path = path.removeprefix(f"{base.path}/").lstrip("/")
        parts = path.split("/")
        if "\0" in path or "\\" in path or "://" in path or path.startswith(("/", "~")) or path[1:2] == ":":
            raise ImageError(
                f"{name}: expected a path under {self.settings[root]} ({base.text!r}), with forward slashes, such as "
                f"{shorten(_as_relative(masked(path[:1000])))!r}.",
                "forbidden path",
            )
        if ".." in parts:
            raise ImageError(f"{name}: '..' would leave {self.settings[root]}.", "forbidden path")
        location = base.child(path)
        if base.is_local:
            # Systems and spreadsheets write an umlaut as one character or as a letter and its dots.
            forms = () if path.isascii() else (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
            location = next((found for found in map(base.child, forms) if os.path.lexists(found.path)), location)
            inside = os.path.realpath(base.path)
            if os.path.commonpath([inside, os.path.realpath(location.path)]) != inside:
                raise ImageError(
                    f"{name}: a link leads out of {self.settings[root]} ({base.text!r}). "
                    "Set it to the folder that holds the files themselves.",
                    "forbidden path",
                )
        return location

    def _not_found(self, path: str, root: Root, name: str) -> ImageError:
        base, setting = self._roots[root], self.settings[root]
        hint = ""
        if path.split("/", 1)[0] == base.name and "/" in path:
            hint = f" Set it to the folder that holds {base.name!r}."
        elif similar := self.similar(path, root):
            hint = f" The file there is named {shorten(similar)!r}: write it so."
        return ImageError(f"{name} is not under {setting} ({base.text!r}).{hint}", "image not found")

    def _too_many_bytes(self, name: str, num_bytes: int) -> ImageError:
        return ImageError(
            f"{name}: {num_bytes:,} bytes are more than the limit of {self.max_bytes:,}. "
            "Store it smaller, or raise data.max_bytes.",
            "image too large",
        )


def _reason(error: OSError) -> str:
    """The error's message, shortened: it repeats the path, whose length a record decides."""
    return shorten(masked(str(error)[:1000]), 500)


def _as_relative(path: str) -> str:
    """An allowed path in place of one that is not: the name alone of a full path."""
    parts = [part for part in re.split(r"[\\/]+", path.replace("\0", "")) if part not in ("", ".", "..")]
    is_full = bool(re.match(r"[\\/~]|.:|.*://", path))
    return parts[-1] if is_full and parts else "/".join(parts)


def image_name(path: str) -> str:
    """Name of an image in messages: its path in the original record, also when packed."""
    return f"image {shorten(masked(original_path(path)[:1000]), 200)!r}"
