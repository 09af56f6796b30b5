"""The connection table seen from user space: ageing, forgetting, growing, reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from podwire.datapath.ebpf.growing import GrowingMap
from podwire.datapath.ebpf.layout import (
    COLLECT,
    CONNECTION,
    FLOW,
    NUMBER,
    CollectMode,
    ConnectionFlag,
    mapped,
    unmapped,
)
from podwire.errors import KernelError
from podwire.kernel.bpf import Map, Program
from podwire.net import Address

LIMIT = 2 << 20
"""Entries beyond which the table does not grow: 1,048,576 connections, as kube-proxy's cap."""
_LOCAL_SOME = 1  # enum local_entries of bpf/conntrack.h
_CURRENT, _RETIRING = NUMBER.pack(0), NUMBER.pack(1)
ESTABLISHED_S = 86400  # kube-proxy's --conntrack-tcp-timeout-established
DATAGRAM_S = 120
SCTP_S = 210  # as bpf/collect.bpf.c has it
_PRESSED = 0.9  # of the limit: what has been silent longest goes early
_PRESSURE = 3  # an eighth of its lifetime is enough then


class Flow(NamedTuple):
    """One direction of a connection."""

    source: Address
    destination: Address
    source_port: int
    destination_port: int
    protocol: int


class Collected(NamedTuple):
    """One walk: entries seen, and entries removed (or moved)."""

    walked: int
    removed: int
    failed: int


class Loaded(Protocol):
    """What the table needs of `Programs`."""

    @property
    def maps(self) -> Mapping[str, Map]: ...
    @property
    def growing(self) -> Mapping[str, GrowingMap]: ...
    @property
    def reads_sockets(self) -> bool: ...
    def program(self, name: str) -> Program: ...
    def run_in_pods(self, program: str, ifindexes: Iterable[int]) -> None: ...


class Connections:
    """Reads and prunes the table; entries are made by the programs alone.

    The table grows to `most` entries.
    """

    def __init__(self, programs: Loaded, most: int = LIMIT) -> None:
        self._programs = programs
        self._most = most
        self.limit = most
        """Entries that it can have: fewer than `most` while the kernel refuses a larger table."""
        self.held = 0
        """Entries when they were last walked; a connection has two."""
        self.affinities = 0
        """Clients with an affinity when they were last walked."""

    def expire(self, pressure: int = 0) -> Collected:
        """Remove what has been silent for too long; `docs/EBPF.md` has the lifetimes.

        `pressure` divides them by 2 so many times.
        """
        self.affinities = self._run("collect_affinities", CollectMode.EXPIRE).walked
        done = self._run("collect", CollectMode.EXPIRE, pressure)
        self.held = done.walked - done.removed
        return done

    def maintain(self) -> Collected:
        """Remove what is old, and grow when three quarters are taken. Call every few seconds.

        A table that cannot grow any more loses what has been silent for an eighth of its time.
        Raises KernelError when the kernel refuses a larger table; the present one goes on.
        """
        self.finish_move()
        self._forget_departed()
        done = self.expire()
        try:
            if 4 * self.held > 3 * self.capacity and self.capacity < self._most:
                self.limit = self.capacity
                self.grow(min(2 * self.capacity, self._most))
                self.limit = self._most
        finally:
            if self.pressed:
                done = self.expire(_PRESSURE)
        return done

    @property
    def pressed(self) -> bool:
        """Whether there was hardly room for more when the table was last walked."""
        return self.held > _PRESSED * self.limit

    @property
    def filling(self) -> bool:
        """Whether the table may be full in seconds, and should be looked after more often."""
        return self.pressed if self.capacity >= self._most else 2 * self.held > self.capacity

    @property
    def capacity(self) -> int:
        """Entries that fit now; a connection has two."""
        return self._programs.growing["connections"].capacity

    def grow(self, capacity: int) -> None:
        """Put a larger table in place. Programs look into both until all entries have moved."""
        outer = self._programs.maps["connections"]
        growing = self._programs.growing["connections"]
        larger = growing.make(capacity)
        outer.update(_RETIRING, NUMBER.pack(growing.map.fd))
        old = growing.exchange(larger)
        self.finish_move()
        old.close()

    def add(self, entries: Mapping[bytes, bytes]) -> None:
        """Write entries that are not there yet, making room for them."""
        held = {key for key, _ in self._programs.growing["connections"].map.items()}
        self._make_room(len(held | entries.keys()))
        new = ((key, value) for key, value in entries.items() if key not in held)
        self._programs.growing["connections"].map.update_batch(new)
        self._have_local_entries()

    def correct(self, held: Mapping[bytes, bytes], pairs: Iterable[Mapping[bytes, bytes]]) -> None:
        """Write both entries of each connection over what was copied before; of one that a program
        has made an entry of, none. Programs may make more meanwhile, from ports of ended ones.

        `held` is the table before `pairs` were found; what packets have shown since then stays.
        """
        wrong = [pair for pair in pairs if any(_differs(held.get(key), pair[key]) for key in pair)]
        self._make_room(len(held) + 2 * len(wrong))
        table = self._programs.growing["connections"].map
        for pair in wrong:
            there = {key: value for key in pair if (value := table.lookup(key))}
            if all(map(_is_copied, there.values())):
                for key, value in pair.items():
                    table.update(key, _with_news(value, held.get(key), there.get(key)))
        self._have_local_entries()

    def _make_room(self, entries: int) -> None:
        if 4 * entries > 3 * self.capacity and self.capacity < self._most:
            self.grow(min(self._most, 2 * max(entries, self.capacity)))

    def _have_local_entries(self) -> None:
        self._programs.maps["local_entries"].update(_CURRENT, NUMBER.pack(_LOCAL_SOME))

    def finish_move(self) -> None:
        """Empty the smaller table: of this process, or of one that ended in the middle."""
        outer = self._programs.maps["connections"]
        if outer.lookup(_RETIRING) is not None:
            self._run("collect", CollectMode.MOVE)
            outer.delete(_RETIRING)

    def forget(self, members: Sequence[bytes]) -> Collected:
        """End UDP flows to these backends and frontends (as keys of the `members` map, list 0)."""
        doomed = self._programs.maps["doomed"]
        size = doomed.info.max_entries
        total = Collected(0, 0, 0)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            doomed.update_batch((member, b"\1") for member in part)
            try:
                done = self._run("collect", CollectMode.DOOMED)
            finally:
                doomed.delete_batch(part)
            total = Collected(done.walked, total.removed + done.removed, total.failed + done.failed)
        return total

    def depart(self, addresses: Iterable[Address]) -> None:
        """These belong to no pod any more: their connections end soon, also if we do."""
        departed = self._programs.maps["departed"]
        for address in addresses:
            try:
                departed.update(mapped(address), b"\1")
            except KernelError:  # full
                self._forget_departed()
                departed.update(mapped(address), b"\1")

    def arrive(self, addresses: Iterable[Address]) -> None:
        """A pod gets these: what was allowed or translated for another is nothing to it."""
        departed = self._programs.maps["departed"]
        if any(departed.lookup(mapped(address)) for address in addresses):
            self._forget_departed()

    def _forget_departed(self) -> None:
        departed = self._programs.maps["departed"]
        if gone := list(departed.keys()):
            self._run("collect", CollectMode.DEPARTED)
            departed.delete_batch(gone)

    def adopt(self, pods: Mapping[int, Sequence[Address]]) -> None:
        """Hold what is open of these pods' own TCP, and no more: addresses by interface."""
        addresses = [mapped(address) for each in pods.values() for address in each]
        if addresses and self._programs.reads_sockets:
            adopted = self._programs.maps["adopted"]
            adopted.update_batch((address, b"\1") for address in addresses)
            try:
                self._run("collect", CollectMode.PLAIN)
            finally:
                adopted.delete_batch(addresses)
            self._programs.run_in_pods("adopt", pods)

    def clear(self) -> None:
        """Forget all connections; those through Services end."""
        table = self._programs.growing["connections"]
        table.map.delete_batch(list(table.read()))

    def items(self) -> Iterator[tuple[Flow, Flow]]:
        """What packets look like and what they become, both directions of every connection."""
        for key, value in self._programs.growing["connections"].map.items():
            yield read_flow(key), read_flow(CONNECTION.unpack(value)[0])

    def _run(self, program: str, mode: CollectMode, pressure: int = 0) -> Collected:
        request = COLLECT.pack(mode, ESTABLISHED_S, DATAGRAM_S, pressure, 0, 0, 0)
        answer = self._programs.program(program).test_run(context=request).context
        return Collected(*COLLECT.unpack(answer)[4:])


def _is_copied(value: bytes) -> bool:
    return bool(CONNECTION.unpack(value)[-1] & ConnectionFlag.COPIED)


def _with_news(value: bytes, before: bytes | None, now: bytes | None) -> bytes:
    """With what was sent between `before` and `now`."""
    to, seen_s, service, state, flags = CONNECTION.unpack(value)
    if before and now:
        state |= CONNECTION.unpack(now)[3] & ~CONNECTION.unpack(before)[3]
    return CONNECTION.pack(to, seen_s, service, state, flags)


def _differs(one: bytes | None, other: bytes) -> bool:
    """In more than when a packet was seen."""
    if one is None:
        return True
    to, _, *rest = CONNECTION.unpack(one)
    other_to, _, *other_rest = CONNECTION.unpack(other)
    return (to, rest) != (other_to, other_rest)


def read_flow(packed: bytes) -> Flow:
    """A `struct flow`; of ICMP echo, both ports are its id."""
    source, destination, source_port, destination_port, protocol = FLOW.unpack(packed)
    return Flow(
        unmapped(source),
        unmapped(destination),
        int.from_bytes(source_port, "big"),
        int.from_bytes(destination_port, "big"),
        protocol,
    )
