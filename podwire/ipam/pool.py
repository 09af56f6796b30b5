"""Addresses handed out from ranges: round robin, with a rest before an address comes back.

In memory and pure: `state` keeps the truth on disk and fills a new pool from it. Which address is
next is found among the intervals of taken ones, so it costs the same with ten and ten thousand
addresses in use.

A freed address rests before it is given to another pod: connection table entries, neighbour caches
and proxies elsewhere still take it for the old one.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from podwire.errors import PodwireError
from podwire.ipam.ranges import Range, RangeSet
from podwire.net import Address, format_address
from podwire.wiring import Key, PodAddress

REST_S = 30.0


class Exhausted(PodwireError):
    """No address is free now; a later try may find one."""


class NotAvailable(PodwireError):
    """A requested address is taken, a gateway's, or in no range."""


class Demand(NamedTuple):
    """One address from each set; `requested` ones must each fit a set of their own.

    `pool` is the name of the space in which an address is given out once.
    """

    pool: str
    sets: tuple[RangeSet, ...]
    requested: tuple[Address, ...] = ()


class AddressPool(Protocol):
    """Where ADD gets addresses from: this module's `Pool` or the VPC's."""

    def allocate(self, owner: Key, demand: Demand) -> tuple[PodAddress, ...]:
        """The owner's addresses; the same again for a second call. May wait.

        Raises Exhausted or NotAvailable; then nothing was taken.
        """
        ...

    def cancel(self, owner: Key) -> None:
        """Take back an allocation that never came into use."""
        ...

    def release(self, owner: Key) -> None:
        """The owner's addresses rest from now on."""
        ...


class Resting(NamedTuple):
    """`until` is in seconds of the pool's clock."""

    pool: str
    address: Address
    until: float


class Cursor(NamedTuple):
    """The address last handed out of a set."""

    pool: str
    set_index: int
    bits: int
    last: int


class Pool:
    """The host's pools. `clock` counts seconds and must outlive restarts (CLOCK_BOOTTIME)."""

    def __init__(self, clock: Callable[[], float], rest_s: float = REST_S) -> None:
        self._clock = clock
        self._rest_s = rest_s
        self._spaces: dict[tuple[str, int], _Space] = {}
        self._owned: dict[Key, tuple[str, tuple[PodAddress, ...]]] = {}
        self._resting: deque[Resting] = deque()
        self._cursors: dict[tuple[str, int, int], int] = {}
        self._lock = threading.Lock()

    def restore(
        self,
        owned: Iterable[tuple[Key, str, Sequence[PodAddress]]],
        resting: Iterable[Resting],
        cursors: Iterable[Cursor],
    ) -> None:
        """Take over what `state` remembers."""
        for owner, pool, addresses in owned:
            self._owned[owner] = (pool, tuple(addresses))
            for each in addresses:
                self._space(pool, each.address).add(int.from_bytes(each.address, "big"))
        for rest in sorted(resting, key=lambda rest: rest.until):
            self._space(rest.pool, rest.address).add(int.from_bytes(rest.address, "big"))
            self._resting.append(rest)
        for cursor in cursors:
            self._cursors[cursor.pool, cursor.set_index, cursor.bits] = cursor.last

    def allocate(self, owner: Key, demand: Demand) -> tuple[PodAddress, ...]:
        with self._lock:
            known = self._owned.get(owner)
            if known:
                return known[1]
            self._wake()
            picks = self._pick_all(demand)
            addresses: list[PodAddress] = []
            for index, (pick, source) in enumerate(picks):
                address = pick.to_bytes(source.bits // 8, "big")
                if address in demand.requested:
                    self._end_rest(demand.pool, address)
                self._space(demand.pool, address).add(pick)
                self._cursors[demand.pool, index, source.bits] = pick
                addresses.append(PodAddress(address, source.subnet.length, source.gateway))
            self._owned[owner] = (demand.pool, tuple(addresses))
            return tuple(addresses)

    def cancel(self, owner: Key) -> None:
        with self._lock:
            pool, addresses = self._owned.pop(owner, ("", ()))
            for each in addresses:
                self._space(pool, each.address).remove(int.from_bytes(each.address, "big"))

    def release(self, owner: Key) -> None:
        with self._lock:
            pool, addresses = self._owned.pop(owner, ("", ()))
            until = self._clock() + self._rest_s
            self._resting.extend(Resting(pool, each.address, until) for each in addresses)

    def rest_until(self) -> float:
        """When an address that is released now will be free again."""
        return self._clock() + self._rest_s

    def cursors(self, pool: str) -> list[Cursor]:
        """Where the sets of a pool stand, for `state`."""
        with self._lock:
            return [Cursor(*key, last) for key, last in self._cursors.items() if key[0] == pool]

    def counts(self) -> dict[str, dict[str, int]]:
        """Per pool: addresses in use and at rest."""
        with self._lock:
            self._wake()
            counts: dict[str, dict[str, int]] = {}
            for pool, addresses in self._owned.values():
                counts.setdefault(pool, {"used": 0, "resting": 0})["used"] += len(addresses)
            for rest in self._resting:
                counts.setdefault(rest.pool, {"used": 0, "resting": 0})["resting"] += 1
            return counts

    def _space(self, pool: str, address: Address) -> _Space:
        return self._spaces.setdefault((pool, len(address) * 8), _Space())

    def _wake(self) -> None:
        """End the rest of addresses whose time is over."""
        now = self._clock()
        while self._resting and self._resting[0].until <= now:
            rest = self._resting.popleft()
            self._space(rest.pool, rest.address).remove(int.from_bytes(rest.address, "big"))

    def _end_rest(self, pool: str, address: Address) -> None:
        self._resting = deque(
            rest for rest in self._resting if (rest.pool, rest.address) != (pool, address)
        )

    def _pick_all(self, demand: Demand) -> list[tuple[int, Range]]:
        requested = list(demand.requested)
        gateways = {each.gateway for ranges in demand.sets for each in ranges}
        for address in requested:
            if address in gateways:
                raise NotAvailable(
                    f"requested IP address {format_address(address)} is subnet's gateway"
                )
        picks: list[tuple[int, Range]] = []
        for index, ranges in enumerate(demand.sets):
            wanted = next((a for a in requested if _range_of(ranges, a)), None)
            if wanted is not None:
                requested.remove(wanted)
                picks.append(self._pick_requested(demand.pool, ranges, wanted))
            else:
                picks.append(self._pick_next(demand.pool, index, ranges))
        if requested:
            texts = ", ".join(map(format_address, requested))
            raise NotAvailable(f"requested addresses fit no range of their own: {texts}")
        return picks

    def _pick_requested(self, pool: str, ranges: RangeSet, address: Address) -> tuple[int, Range]:
        source = _range_of(ranges, address)
        number = int.from_bytes(address, "big")
        # Who asks for one address by name (a pod that was restarted) need not wait for its rest.
        resting = any(rest.pool == pool and rest.address == address for rest in self._resting)
        if source is None or (number in self._space(pool, address) and not resting):
            raise NotAvailable(f"requested IP address {format_address(address)} is in use")
        return number, source

    def _pick_next(self, pool: str, index: int, ranges: RangeSet) -> tuple[int, Range]:
        bits = ranges[0].bits
        space = self._spaces.setdefault((pool, bits), _Space())
        gateways = {int.from_bytes(each.gateway, "big") for each in ranges}
        last = self._cursors.get((pool, index, bits), -1)
        start = next((i for i, each in enumerate(ranges) if last in each), None)
        turns = [(each.first, each.last, each) for each in ranges]
        if start is not None:  # from behind the last one, round to it at the very end
            current = ranges[start]
            turns = [*turns[start:], *turns[:start], (current.first, last, current)]
            turns[0] = (last + 1, current.last, current)
        for first, end, source in turns:
            number = space.next_free(first)
            while number in gateways:
                number = space.next_free(number + 1)
            if number <= end:
                return number, source
        names = ", ".join(map(str, ranges))
        resting = sum(rest.pool == pool and len(rest.address) * 8 == bits for rest in self._resting)
        more = f" ({resting} rest after their last use)" if resting else ""
        raise Exhausted(f"no IP addresses available in range set: {names}{more}")


def _range_of(ranges: RangeSet, address: Address) -> Range | None:
    number = int.from_bytes(address, "big")
    return next((e for e in ranges if e.bits == len(address) * 8 and number in e), None)


@dataclass
class _Space:
    """Taken numbers as disjoint intervals that do not touch: `_starts[i]` to `_ends[i]`."""

    _starts: list[int] = field(default_factory=list[int])
    _ends: list[int] = field(default_factory=list[int])

    def __contains__(self, number: int) -> bool:
        i = bisect_right(self._starts, number) - 1
        return i >= 0 and number <= self._ends[i]

    def next_free(self, number: int) -> int:
        """The first free number from `number` on."""
        i = bisect_right(self._starts, number) - 1
        return self._ends[i] + 1 if i >= 0 and number <= self._ends[i] else number

    def add(self, number: int) -> None:
        if number in self:
            return
        i = bisect_right(self._starts, number)  # where an interval of its own would go
        joins_before = i > 0 and self._ends[i - 1] == number - 1
        joins_after = i < len(self._starts) and self._starts[i] == number + 1
        if joins_before and joins_after:
            self._ends[i - 1] = self._ends.pop(i)
            del self._starts[i]
        elif joins_before:
            self._ends[i - 1] = number
        elif joins_after:
            self._starts[i] = number
        else:
            self._starts.insert(i, number)
            self._ends.insert(i, number)

    def remove(self, number: int) -> None:
        if number not in self:
            return
        i = bisect_right(self._starts, number) - 1
        start, end = self._starts[i], self._ends[i]
        if start == end:
            del self._starts[i], self._ends[i]
        elif number == start:
            self._starts[i] = number + 1
        elif number == end:
            self._ends[i] = number - 1
        else:
            self._ends[i] = number - 1
            self._starts.insert(i + 1, number + 1)
            self._ends.insert(i + 1, end)
