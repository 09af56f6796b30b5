"""The manager as an `AddressPool`: ADD and DEL come in threads, the manager has one loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from podwire.ipam.pool import Cursor, Demand, Exhausted, NotAvailable, Pool, Resting
from podwire.ipam.vpc.limits import route_table
from podwire.ipam.vpc.manager import STOPPED, Manager
from podwire.net import Address
from podwire.wiring import Attachment, Key, PodAddress

T = TypeVar("T")

POOL = "*vpc"
"""The name under which addresses of the VPC are kept (no network's name has a star)."""
WAIT_S = 25.0  # ADD gives up after 30 s: what is left is for the link


class VpcPool:
    """Addresses of the VPC; what asks for ranges of its own gets them from the host's pool."""

    def __init__(
        self, manager: Manager[Key], loop: asyncio.AbstractEventLoop, host: Pool, wait_s: float
    ) -> None:
        self._manager, self._loop, self._host, self._wait_s = manager, loop, host, wait_s

    def restore(self, attachments: Iterable[Attachment], resting: Iterable[Resting]) -> None:
        """Take over what the state file remembers. Before the manager starts."""
        self._manager.store.restore(
            [
                (known.key, each.address)
                for known in attachments
                if known.pool == POOL
                for each in known.addresses
            ],
            [(each.address, each.until) for each in resting if each.pool == POOL],
        )

    def allocate(self, owner: Key, demand: Demand) -> tuple[PodAddress, ...]:
        if demand.pool != POOL:
            return self._host.allocate(owner, demand)
        if demand.requested:
            raise NotAvailable("addresses of the VPC cannot be asked for by name")
        assignment = self._ask(self._manager.assign(owner, self._wait_s))
        return (PodAddress(assignment.address, len(assignment.address) * 8),)

    def cancel(self, owner: Key) -> None:
        self._host.cancel(owner)
        self._ask(self._cancel(owner))

    def release(self, owner: Key) -> None:
        self._host.release(owner)
        self._ask(self._release(owner))

    def cursors(self, pool: str) -> list[Cursor]:
        return self._host.cursors(pool)

    def rest_until(self) -> float:
        """The longer of both rests: the VPC's is the user's to choose."""
        return max(self._host.rest_until(), self._manager.store.rest_until())

    def table_of(self, address: Address) -> int:
        """The route table of the ENI that has the address; 0 for an address not of the VPC."""
        eni = self._manager.store.eni_of(address)
        if eni is None:
            return 0
        return route_table(eni.record.card_index, eni.record.device_index or 0)

    def dismiss(self) -> None:
        """Nobody waits for an address any longer: the agent ends."""
        self._loop.call_soon_threadsafe(self._manager.dismiss)

    async def _cancel(self, owner: Key) -> None:
        self._manager.cancel(owner)

    async def _release(self, owner: Key) -> None:
        self._manager.release(owner)

    def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except (CancelledError, RuntimeError) as error:  # the agent ends
            work.close()
            raise Exhausted(STOPPED) from error
