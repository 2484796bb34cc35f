"""Prepared edit requests of earlier runs: the arms of a study edit the same records, and pictures take time to read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from odedit.edits import EditRequest

MAX_BYTES = 512 * 2**20


class RequestCache:
    """Keeps the requests used last, up to so many bytes of pictures."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[Hashable, tuple[EditRequest, int]] = OrderedDict()

    def get(self, key: Hashable) -> EditRequest | None:
        """The request kept under that key."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, request: EditRequest) -> None:
        """Keeps a request; lets go of those that were not used for longest where there is no room."""
        # Equal pictures of one request are one object.
        size = sum({id(picture): picture.pixels.nbytes for picture in request.pictures()}.values())
        self._bytes += size - self._kept.pop(key, (request, 0))[1]
        self._kept[key] = (request, size)
        while self._bytes > self._max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1][1]
