"""Prepared edit requests of earlier runs: the arms of a study edit the same records, and pictures take time to read."""

from __future__ import annotations

from collections.abc import Hashable

from odedit.inputs.batch import EditRequest
from odedit.runtime.lru import LRU

MAX_BYTES = 512 * 2**20


class RequestCache:
    """Keeps the requests used last, up to so many bytes of pictures."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._kept: LRU[EditRequest] = LRU(max_bytes)

    def get(self, key: Hashable) -> EditRequest | None:
        """The request kept under that key."""
        return self._kept.get(key)

    def put(self, key: Hashable, request: EditRequest) -> None:
        """Keeps a request; lets go of those that were not used for longest where there is no room."""
        # Equal pictures of one request are one object.
        pictures = {id(picture): picture.pixels.nbytes for picture in request.pictures()}
        self._kept.put(key, request, sum(pictures.values()))
