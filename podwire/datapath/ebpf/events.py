"""What the programs tell: packets that were refused, from the ring buffer, with reasons in words.

At most `EVENTS_PER_SECOND` of each reason; the counters (`Programs.outcomes`) know them all.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from podwire.datapath.ebpf.connections import Flow, read_flow
from podwire.datapath.ebpf.layout import EVENT, EVENTS_PER_SECOND, Reason
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel.bpf import RingBuffer

__all__ = ["EVENTS_PER_SECOND", "PASSED", "WORDS", "Event", "EventReader"]

WORDS = {
    Reason.FORWARDED: "sent on by podwire's own look-up, past the stack",
    Reason.TRANSLATED: "connections that a Service or masquerading changed",
    Reason.REJECTED: "Service without endpoints, or no such port: the client was told",
    Reason.NO_LOCAL_ENDPOINT: "Service with traffic policy Local and no endpoint on this node",
    Reason.UNALLOCATED: "address of a Service range that no Service has",
    Reason.SOURCE_RANGE: "source outside loadBalancerSourceRanges",
    Reason.SPOOFED: "source address or MAC is not the pod's own, or loopback from elsewhere",
    Reason.POLICY: "denied by policy",
    Reason.POLICY_AUDIT: "would be denied by a policy in audit mode",
    Reason.CONNECTIONS_FULL: "connection table full",
    Reason.PORTS_EXHAUSTED: "no port left to masquerade with, or with DSR the client's is taken",
    Reason.FRAGMENT_LOST: "fragment that came before its first, or too late",
    Reason.BROKEN: "malformed packet",
    Reason.WRITE_FAILED: "packet could not be rewritten (no memory)",
    Reason.NO_ROUTE: "no route to the backend",
    Reason.TOO_BIG: "larger than the MTU of its way, after translation",
    Reason.AFFINITY_FULL: "clients whose backend could not be remembered: the map is full",
    Reason.EVENTS_LOST: "refusals that were counted, but not told one by one",
    Reason.REPLACED: "list of backends that gave way to another at this moment",
    Reason.LED_ASTRAY: "led here by DSR for no Service that has this backend here",
    Reason.EVICTED: "silent connections forgotten early: the table was nearly full",
}
PASSED = frozenset(
    (
        Reason.FORWARDED,
        Reason.TRANSLATED,
        Reason.POLICY_AUDIT,
        Reason.AFFINITY_FULL,
        Reason.EVICTED,
    )
)
"""What does not end a packet."""


class Event(NamedTuple):
    """One refusal. `ruling` is the number of what policies decided, or 0; `time_s` since 1970.

    `flow` is the packet's, its destination translated already where a Service was asked.
    """

    time_s: float
    reason: Reason
    ifindex: int
    ruling: int
    egress: bool
    flow: Flow


class EventReader:
    """Reads the ring buffer: one reader per node. What nobody read yet is kept for the next one."""

    def __init__(self, programs: Programs) -> None:
        self._ring = RingBuffer(programs.maps["events"])

    def fileno(self) -> int:
        """Readable when events wait."""
        return self._ring.fileno()

    def read(self) -> list[Event]:
        """The events that are there now."""
        started_s = time.time() - time.monotonic()
        return [_event(record, started_s) for record in self._ring.read()]

    def close(self) -> None:
        self._ring.close()


def _event(record: bytes, started_s: float) -> Event:
    time_ns, reason, ifindex, ruling, _, egress, flow = EVENT.unpack(record)
    return Event(
        started_s + time_ns / 1e9, Reason(reason), ifindex, ruling, bool(egress), read_flow(flow)
    )
