"""The agent's main loop: objects change, tables follow, the kernel follows the tables.

Adds go out as soon as a change is seen. Deletes wait `FLUSH_DELAY_S`, so that a burst costs one
grace period of the kernel. Large change sets (a cold start) and deletes run in a thread: the CNI
socket and the health checks stay quick meanwhile. One lock keeps a part's calls apart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from podwire.agent.logs import event
from podwire.agent.sync import Sync
from podwire.kube.store import ChangeSet, Store

log = logging.getLogger("podwire.agent.loop")

FLUSH_DELAY_S = 0.010
LARGE_CHANGE = 500  # objects; more than that takes longer than a health check should wait


class Loop:
    """Runs the syncs of one agent, in order, whenever the store has changes."""

    def __init__(
        self,
        store: Store,
        syncs: Sequence[Sync[Any]],
        *,
        verify_period_s: float,
        before: Callable[[ChangeSet], None],
        after: Callable[[ChangeSet, float], None],
    ) -> None:
        self._store, self._syncs = store, syncs
        self._verify_period_s = verify_period_s
        self._before, self._after = before, after
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._flush_at: float | None = None
        self._verify_at = time.monotonic() + verify_period_s
        self.queued_since = 0.0  # wall clock; 0: nothing waits

    def wake(self) -> None:
        """The store has changed."""
        if not self.queued_since:
            self.queued_since = time.time()
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._pause()
            await self.step()

    async def step(self) -> None:
        """Everything that is due: changes, retries, deletes, the integrity check."""
        self._wake.clear()
        async with self._lock:
            changes = self._store.take()
            if changes:
                await self._program(changes)
            now = time.monotonic()
            for sync in self._syncs:
                if sync.retry_at is not None and sync.retry_at <= now:
                    await asyncio.to_thread(sync.retry)
            if self._flush_at is not None and self._flush_at <= now:
                self._flush_at = None
                for sync in self._syncs:
                    if sync.waiting_deletes:
                        await asyncio.to_thread(sync.flush)
            if self._verify_at <= now:
                await self._verify()
        if all(sync.retry_at is None for sync in self._syncs) and not self._wake.is_set():
            self.queued_since = 0.0

    async def resync(self, sync: Sync[Any]) -> bool:
        """Compile and apply one part now, with what its compiler was told besides objects."""
        async with self._lock:
            changes = self._store.take()
            if changes:
                await self._program(changes)
            done = sync.run(_NOTHING)
            self._flush_later()
            return done

    async def verify(self, sync: Sync[Any]) -> list[str]:
        """Check one part against the kernel now; the repairs."""
        async with self._lock:
            return await asyncio.to_thread(sync.verify)

    async def _program(self, changes: ChangeSet) -> None:
        began = time.time()
        self._before(changes)
        for sync in self._syncs:
            if len(changes) > LARGE_CHANGE:
                await asyncio.to_thread(sync.run, changes)
            else:
                sync.run(changes)
        self._flush_later()
        self._after(changes, began)

    async def _verify(self) -> None:
        self._verify_at = time.monotonic() + self._verify_period_s
        for sync in self._syncs:
            repairs = await asyncio.to_thread(sync.verify)
            if repairs:
                event(log, logging.WARNING, "integrity check repaired the kernel",
                      part=sync.name, repairs=len(repairs))  # fmt: skip

    def _flush_later(self) -> None:
        if self._flush_at is None:
            self._flush_at = time.monotonic() + FLUSH_DELAY_S

    async def _pause(self) -> None:
        due = [self._verify_at]
        due += [sync.retry_at for sync in self._syncs if sync.retry_at is not None]
        if self._flush_at is not None:
            due.append(self._flush_at)
        delay = min(due) - time.monotonic()
        if delay <= 0 or self._wake.is_set():
            return
        try:
            await asyncio.wait_for(self._wake.wait(), delay)
        except TimeoutError:
            return


_NOTHING = ChangeSet({})
