"""An event loop whose clock jumps to the next timer: hours of backoff run in milliseconds.

For code that is told its clock and sleeps through asyncio only: no threads, no sockets.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` stands still while anything can run, then goes on to the next timer."""

    def __init__(self, start: float = 1000.0) -> None:
        self._virtual_now = start
        super().__init__()

    def time(self) -> float:
        return self._virtual_now

    def _run_once(self) -> None:
        """Called by the base class for each turn of the loop."""
        base: Any = self  # the base class's own fields, which have no public name
        while base._scheduled and base._scheduled[0].cancelled():
            heapq.heappop(base._scheduled)._scheduled = False
            base._timer_cancelled_count -= 1
        if not base._ready and base._scheduled:
            self._virtual_now = max(self._virtual_now, base._scheduled[0].when())
        turn: Any = super()
        turn._run_once()


def run(work: Coroutine[Any, Any, T], loop: VirtualLoop | None = None) -> T:
    """Run `work` to its end in virtual time."""
    loop = loop or VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()
