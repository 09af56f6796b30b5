"""When to try again: exponential, with jitter so that a thousand nodes do not come back at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from podwire.ipam.vpc.cloud import CloudError

T = TypeVar("T")


class Backoff:
    """Delays in seconds, doubled from `base_s` to `cap_s`, each cut by up to a half at random."""

    def __init__(self, randomness: random.Random, base_s: float = 0.5, cap_s: float = 30.0) -> None:
        self._random, self._base_s, self._cap_s = randomness, base_s, cap_s
        self._failures = 0

    def next(self) -> float:
        delay = min(self._cap_s, self._base_s * 2 ** min(self._failures, 16))
        self._failures += 1
        return delay * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._failures = 0


async def retried(
    call: Callable[[], Awaitable[T]], backoff: Backoff, tries: int, also_throttled: bool = False
) -> T:
    """The answer to `call`, asked again while nobody answers.

    When EC2 throttles it wants fewer requests, and most who ask know how to wait.
    """
    for left in range(tries - 1, -1, -1):
        try:
            return await call()
        except CloudError as error:
            again = error.unanswered or (also_throttled and error.throttled)
            if not left or not again:
                raise
        await asyncio.sleep(backoff.next())
    raise AssertionError("no tries")
