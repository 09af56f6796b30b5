"""The connection table seen from user space: ageing, forgetting, growing, reading."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from podwire.datapath.ebpf.layout import COLLECT, CONNECTION, FLOW, NUMBER, CollectMode, unmapped
from podwire.net import Address

if TYPE_CHECKING:
    from podwire.datapath.ebpf.programs import Programs

log = logging.getLogger(__name__)

LIMIT = 2 << 20
"""Entries beyond which the table does not grow: 1,048,576 connections, as kube-proxy's cap."""
_CURRENT, _RETIRING = NUMBER.pack(0), NUMBER.pack(1)
ESTABLISHED_S = 86400  # kube-proxy's --conntrack-tcp-timeout-established
DATAGRAM_S = 120


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


class Connections:
    """Reads and prunes the table; entries are made by the programs alone."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def expire(self) -> Collected:
        """Remove what has been silent for too long: TCP a day, closed TCP 30 s, UDP 30 to 120 s."""
        self._run("collect_affinities", CollectMode.EXPIRE)
        return self._run("collect", CollectMode.EXPIRE)

    def maintain(self) -> Collected:
        """Remove what is old, and grow when three quarters are taken. Call every few seconds."""
        done = self.expire()
        held, capacity = done.walked - done.removed, self.capacity
        if 4 * held > 3 * capacity:
            if capacity < LIMIT:
                self.grow(2 * capacity)
            else:
                log.warning("the connection table is nearly full: %d of %d", held, capacity)
        return done

    @property
    def capacity(self) -> int:
        """Entries that fit now; a connection has two."""
        return self._programs.growing["connections"].capacity

    def grow(self, capacity: int) -> None:
        """Put a larger table in place. Programs look into both until all entries have moved."""
        outer = self._programs.maps["connections"]
        growing = self._programs.growing["connections"]
        old = growing.map
        outer.update(_RETIRING, NUMBER.pack(old.fd))
        growing.exchange(capacity)
        self._run("collect", CollectMode.MOVE)
        outer.delete(_RETIRING)
        old.close()

    def forget(self, members: Sequence[bytes]) -> Collected:
        """End UDP flows to these backends (keys of the `members` map, local 0)."""
        doomed = self._programs.maps["doomed"]
        doomed.update_batch((member, b"\1") for member in members)
        try:
            return self._run("collect", CollectMode.DOOMED)
        finally:
            doomed.delete_batch(members)

    def clear(self) -> None:
        """Forget all connections; those through Services end."""
        table = self._programs.growing["connections"]
        table.map.delete_batch(list(table.read()))

    def items(self) -> Iterator[tuple[Flow, Flow]]:
        """What packets look like and what they become, both directions of every connection."""
        for key, value in self._programs.growing["connections"].map.items():
            yield read_flow(key), read_flow(CONNECTION.unpack(value)[0])

    def _run(self, program: str, mode: CollectMode) -> Collected:
        request = COLLECT.pack(mode, ESTABLISHED_S, DATAGRAM_S, 0, 0, 0)
        answer = self._programs.program(program).test_run(context=request).context
        return Collected(*COLLECT.unpack(answer)[3:])


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
