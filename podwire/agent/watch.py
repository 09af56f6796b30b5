"""What somebody else does to our links, routes and rules is noticed as it happens, and undone.

A `Watcher` says which notifications concern it and how it puts things right. Notifications come in
bursts (systemd-networkd restarts), so a repair waits `SETTLE_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from podwire.agent.logs import event
from podwire.errors import PodwireError
from podwire.kernel.monitor import Event, Group, Monitor

log = logging.getLogger("podwire.agent.watch")

SETTLE_S = 0.2
_GROUPS = (
    Group.LINK,
    Group.IPV4_ADDRESS,
    Group.IPV6_ADDRESS,
    Group.IPV4_ROUTE,
    Group.IPV6_ROUTE,
    Group.IPV4_RULE,
    Group.IPV6_RULE,
    Group.NEIGHBOUR,
)


@dataclass(frozen=True)
class Watcher:
    """Who watches. `repair` returns what it repaired, one sentence each."""

    name: str
    concerns: Callable[[Event], bool]
    repair: Callable[[], Awaitable[list[str]]]


class KernelWatch:
    """Listens in the agent's network namespace."""

    def __init__(self, watchers: Sequence[Watcher], repaired: Callable[[str, int], None]) -> None:
        self._watchers = watchers
        self._repaired = repaired
        self._due: set[str] = set()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        monitor = Monitor(list(_GROUPS))
        main = asyncio.get_running_loop()
        main.add_reader(monitor.fileno(), self._read, monitor)
        try:
            while True:
                await self._wake.wait()
                await asyncio.sleep(SETTLE_S)
                self._wake.clear()
                due, self._due = self._due, set()
                for watcher in self._watchers:
                    if watcher.name in due:
                        await self._repair(watcher)
        finally:
            main.remove_reader(monitor.fileno())
            with contextlib.suppress(OSError):
                monitor.close()

    def _read(self, monitor: Monitor) -> None:
        for each in monitor.drain():
            for watcher in self._watchers:
                if watcher.name not in self._due and watcher.concerns(each):
                    self._due.add(watcher.name)
                    self._wake.set()

    async def _repair(self, watcher: Watcher) -> None:
        try:
            repairs = await watcher.repair()
        except PodwireError as error:
            event(log, logging.ERROR, "not repaired", part=watcher.name, error=error)
            return
        for repair in repairs:
            event(log, logging.WARNING, "repaired", part=watcher.name, what=repair)
        if repairs:
            self._repaired(watcher.name, len(repairs))
