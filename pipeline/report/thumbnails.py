"""Small WebP copies of records' pictures, equal ones once, within a budget of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from odedit.data.decoding import decode
from odedit.data.fields import ImageReference
from odedit.data.images import ImageError, ImageReader, image_name
from odedit.errors import StorageError
from odedit.inputs.html import SIDE, thumbnail

_SMALL_SIDE, _MANY = 64, 4000
"""Longest side if there are more pictures than `_MANY`."""
_AT_ONCE, _READERS = 64, 8


class Thumbnails:
    """The thumbnails of a page.

    Attributes:
        texts: Distinct thumbnails, WebP in base64.
        is_full: Whether pictures were left out for want of space.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.is_full = False
        self._known: dict[str, int] = {}
        self._index: dict[ImageReference, int] = {}

    @classmethod
    def read(cls, images: Iterable[ImageReference], reader: ImageReader | None, max_bytes: int) -> Thumbnails:
        """Reads pictures in the given order, until the thumbnails take `max_bytes` of text.

        A picture that cannot be read has no thumbnail; a storage that fails ends the reading.

        Args:
            reader: Reader of the pictures; None: none can be read.
        """
        thumbnails = cls()
        if reader is None:
            return thumbnails
        distinct = list(dict.fromkeys(images))
        maker = _Maker(reader, SIDE if len(distinct) <= _MANY else _SMALL_SIDE)
        num_bytes = 0
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(distinct), _AT_ONCE):
                some = distinct[start : start + _AT_ONCE]
                try:
                    texts = list(pool.map(maker, some))
                except StorageError:
                    return thumbnails
                for image, text in zip(some, texts, strict=True):
                    if text is None:
                        continue
                    if text not in thumbnails._known:
                        num_bytes += len(text)
                        if num_bytes > max_bytes:
                            thumbnails.is_full = True
                            return thumbnails
                        thumbnails._known[text] = len(thumbnails.texts)
                        thumbnails.texts.append(text)
                    thumbnails._index[image] = thumbnails._known[text]
        return thumbnails

    def index(self, image: ImageReference | None) -> int | None:
        """Position of a picture's thumbnail in `texts`; None if it has none."""
        return None if image is None else self._index.get(image)


class _Maker:
    """Makes thumbnails, of files with the same content once; several threads may call it."""

    def __init__(self, reader: ImageReader, side: int) -> None:
        self._reader, self._side = reader, side
        self._made: dict[bytes, str] = {}

    def __call__(self, image: ImageReference) -> str | None:
        """The thumbnail of a picture; None if it cannot be read."""
        try:
            data = self._reader.read_bytes(image.path, image.root)
            key = hashlib.sha256(data).digest()
            if key not in self._made:
                self._made[key] = thumbnail(decode(data, image_name(image.path), self._reader.max_pixels), self._side)
            return self._made[key]
        except ImageError:
            return None
