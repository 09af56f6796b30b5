"""What happened lately and what happens now, for any number of followers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from podwire.agent.control import Query

_REMEMBERED = 1000
_WAITING = 1000


class Feed:
    """Documents in order. A follower that does not keep up misses some."""

    def __init__(self) -> None:
        self._last: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self._followers: set[asyncio.Queue[dict[str, Any]]] = set()

    def publish(self, document: dict[str, Any]) -> None:
        self._last.append(document)
        for queue in self._followers:
            if queue.qsize() < _WAITING:
                queue.put_nowait(document)

    async def follow(self, query: Query) -> AsyncIterator[dict[str, Any]]:
        """The last ones, and with ``follow`` in the query those to come."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._followers.add(queue)
        try:
            for document in list(self._last):
                yield document
            while query.get("follow"):
                yield await queue.get()
        finally:
            self._followers.discard(queue)
