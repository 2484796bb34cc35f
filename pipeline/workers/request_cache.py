"""A cache of prepared edit requests, since the arms of a study edit the same records."""

from __future__ import annotations

from collections.abc import Hashable

from odedit.inputs.batch import EditRequest
from odedit.runtime.lru import LRU

MAX_BYTES = 512 * 2**20


class RequestCache:
    """An LRU cache of requests, bounded by the bytes of their pictures."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._kept: LRU[EditRequest] = LRU(max_bytes)

    def get(self, key: Hashable) -> EditRequest | None:
        """The request with that key, or None."""
        return self._kept.get(key)

    def put(self, key: Hashable, request: EditRequest) -> None:
        """Adds a request; evicts the least recently used ones when the cache is full."""
        # Equal pictures of a request are one object and count once.
        pictures = {id(picture): picture.pixels.nbytes for picture in request.pictures()}
        self._kept.put(key, request, sum(pictures.values()))
